"""From questions and a teacher's samples to rationale sets: the tables, their readers, the vote."""
