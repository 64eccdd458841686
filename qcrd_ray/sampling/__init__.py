"""All that generates text: the engine protocol, one file an engine, and the actor pool."""
