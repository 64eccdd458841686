"use strict";
// The table of questions, and the rationales of one of them. Every text of a model is set as text, never as markup.
(async () => {
  const PAGE_ROWS = 25, SHORT = 240, LONG = 600;
  const ready = (how) => {
    document.documentElement.dataset.seconds = String(performance.now() / 1000);
    document.documentElement.dataset.ready = how;
  };
  const $ = (id) => document.getElementById(id);
  const holder = $("packed");
  if (!holder) { ready("yes"); return; }

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  let table;
  try {
    const packed = atob(holder.textContent.trim()), bytes = new Uint8Array(packed.length);
    for (let at = 0; at < packed.length; at += 1) bytes[at] = packed.charCodeAt(at);
    const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    table = JSON.parse(await new Response(unpacked).text());
    holder.remove();
  } catch (error) {
    $("found").textContent = "This browser cannot unpack the table (Chrome 80, Firefox 113 and Safari 16.4 can).";
    ready("failed");
    return;
  }
  const { runs, kinds, columns, rows, texts } = table;
  const [SPLIT, ID, QUESTION, VALUES, ITEMS] = [0, 1, 2, 3, 4];
  const several = runs.length > 1;

  // A text of a model: isolated, so that its direction stays its own, and short until all of it is asked for.
  function modelText(text, limit) {
    const made = element("bdi", "model");
    made.dir = "auto";
    if (text === "") { made.append(element("i", "faint", "empty")); return made; }
    if (text.length <= limit) { made.textContent = text; return made; }
    let end = limit;
    if (text.charCodeAt(end - 1) >= 0xd800 && text.charCodeAt(end - 1) < 0xdc00) end -= 1;
    made.textContent = text.slice(0, end) + "… ";
    const all = element("button", "all", `show all ${text.length.toLocaleString("en")} characters`);
    all.type = "button";
    all.addEventListener("click", (event) => { event.stopPropagation(); made.textContent = text; });
    made.append(all);
    return made;
  }

  const shown = {
    text: (value) => modelText(String(value), 60),
    number: (value) => document.createTextNode(value.toFixed(2)),
    whole: (value) => document.createTextNode(String(value)),
    verdict: (value) => element("span", value ? "good" : "bad", value ? "✓ yes" : "✗ no"),
  };
  const cell = (kind, value) => (value === null ? document.createTextNode("–") : shown[kind](value));

  // What is shown: rows that hold every word, in the order that was asked for.

  const haystacks = new Array(rows.length);
  function haystack(index) {
    if (haystacks[index] === undefined) {
      const row = rows[index];
      const parts = [row[ID], row[SPLIT], texts[row[QUESTION]], ...row[VALUES].filter((v) => typeof v === "string")];
      for (const item of row[ITEMS]) parts.push(texts[item[3]]);
      haystacks[index] = parts.join("\n").toLowerCase();
    }
    return haystacks[index];
  }

  let order = rows.map((_, index) => index), found = order, page = 0, sorted = -1, descending = false;
  const open = new Set();

  const inOrder = new Intl.Collator("en", { numeric: true });
  function sortBy(column, down) {
    sorted = column; descending = down;
    const key = (index) => (column < 0 ? index : rows[index][VALUES][column]);
    order = rows.map((_, index) => index);
    if (column >= 0) {
      order.sort((a, b) => {
        const first = key(a), second = key(b);
        if (first === null || second === null) return (first === null) - (second === null) || a - b;
        if (first === second) return a - b;
        const least = typeof first === "string" ? inOrder.compare(first, second) : first - second;
        return least * (down ? -1 : 1) || a - b;
      });
    }
    choose();
  }

  function choose() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const split = $("split").value;
    found = order.filter((index) => (split === "" || rows[index][SPLIT] === split)
      && (words.length === 0 || words.every((word) => haystack(index).includes(word))));
    page = 0;
    draw();
  }

  // Drawing

  function draw() {
    const first = page * PAGE_ROWS, last = Math.min(first + PAGE_ROWS, found.length);
    const body = $("rows");
    body.replaceChildren(...found.slice(first, last).flatMap(drawRow));
    const range = found.length ? `${(first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ` : "";
    $("found").textContent = `${range}${found.length.toLocaleString("en")} questions`;
    $("previous").disabled = page === 0;
    $("next").disabled = last >= found.length;
    for (const head of $("heads").children) {
      const is = Number(head.dataset.column) === sorted && sorted >= 0;
      head.setAttribute("aria-sort", is ? (descending ? "descending" : "ascending") : "none");
    }
    $("order").value = String(sorted);
  }

  function drawRow(index) {
    const row = rows[index], line = element("tr", "question");
    const main = element("td");
    const more = element("button", "more", open.has(index) ? "▾" : "▸");
    more.type = "button";
    more.setAttribute("aria-expanded", String(open.has(index)));
    more.setAttribute("aria-label", "rationales");
    more.dataset.index = String(index);
    more.addEventListener("click", () => {
      open.has(index) ? open.delete(index) : open.add(index);
      draw();
      document.querySelector(`.more[data-index="${index}"]`).focus();
    });
    const id = element("bdi", "faint id", `${row[SPLIT]} ${row[ID]}`);
    main.append(more, modelText(texts[row[QUESTION]], SHORT), element("br"), id);
    line.append(main);
    columns.forEach((column, place) => {
      const data = element("td", column.kind === "text" ? "" : row[VALUES][place] === null ? "n none" : "n");
      data.dataset.title = column.title;
      data.append(cell(column.kind, row[VALUES][place]));
      line.append(data);
    });
    if (!open.has(index)) return [line];
    const below = element("tr", "items"), wide = element("td");
    wide.colSpan = columns.length + 1;
    wide.append(...row[ITEMS].map(drawItem));
    if (!row[ITEMS].length) wide.append(element("p", "", "No rationales are kept of it."));
    below.append(wide);
    return [line, below];
  }

  function drawItem([run, kind, temperature, text, score]) {
    const made = element("div", `item kind-${kind}`), head = element("div", "faint");
    const words = [kinds[kind]];
    if (temperature !== null) words.push(`temperature ${temperature}`);
    if (score !== null) words.push(`score ${score.toFixed(3)}`);
    if (several) words.push(runs[run]);
    head.append(element("bdi", "", words.join(" · ")));
    made.append(head, modelText(texts[text], LONG));
    return made;
  }

  // Controls

  const heads = $("heads"), orders = $("order");
  const question = element("th", "", "Question");
  question.dataset.column = "-1";
  heads.replaceChildren(question);
  orders.append(new Option("as in the data", "-1"));
  columns.forEach((column, place) => {
    const head = element("th", column.kind === "text" ? "" : "n");
    head.dataset.column = String(place);
    const sorter = element("button", "sort", column.title);
    sorter.type = "button";
    sorter.addEventListener("click", () => sortBy(place, sorted === place ? !descending : column.kind !== "text"));
    head.append(sorter);
    heads.append(head);
    orders.append(new Option(column.title, String(place)));
  });
  orders.addEventListener("change", () => sortBy(Number(orders.value), descending));
  $("direction").addEventListener("click", () => sortBy(sorted, !descending));
  const splits = [...new Set(rows.map((row) => row[SPLIT]))];
  $("split").append(new Option("all splits", ""), ...splits.map((split) => new Option(split, split)));
  $("split").addEventListener("change", choose);
  let waiting;
  $("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(choose, 120); });
  $("previous").addEventListener("click", () => { page -= 1; draw(); });
  $("next").addEventListener("click", () => { page += 1; draw(); });

  // One question's rationales at several temperatures

  const chooser = $("case");
  if (chooser) {
    const STUDENT = kinds.indexOf("student");
    const observed = rows.filter((row) => row[ITEMS].some((item) => item[1] === STUDENT));
    const drawCase = () => {
      const row = observed[Number(chooser.value)];
      const temperatures = [...new Set(row[ITEMS].filter((i) => i[1] === STUDENT).map((i) => i[2]))].sort((a, b) => a - b);
      $("case-question").replaceChildren(modelText(texts[row[QUESTION]], LONG));
      $("case-rows").replaceChildren(...temperatures.map((temperature) => {
        const line = element("tr");
        line.append(element("th", "", temperature === 0 ? "0 (greedy)" : String(temperature)));
        runs.forEach((name, run) => {
          const data = element("td");
          data.dataset.title = name;
          for (const item of row[ITEMS].filter((i) => i[0] === run && i[1] === STUDENT && i[2] === temperature)) {
            data.append(modelText(texts[item[3]], LONG));
            if (item[4] !== null) data.append(element("div", "faint", `score ${item[4].toFixed(3)}`));
          }
          line.append(data);
        });
        return line;
      }));
    };
    observed.forEach((row, place) => {
      const text = texts[row[QUESTION]];
      const first = place === Number(chooser.dataset.place);
      chooser.append(new Option(`${row[ID]}: ${text.replace(/\s+/g, " ").slice(0, 80)}`, String(place), false, first));
    });
    chooser.addEventListener("change", drawCase);
  }

  draw();
  requestAnimationFrame(() => setTimeout(() => ready("yes")));  // once it is painted
})();
