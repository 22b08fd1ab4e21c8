(() => {
  const rows = JSON.parse(document.getElementById("data")?.textContent || "[]");
  const form = document.getElementById("filters");
  if (!form) return;
  const body = document.getElementById("rows"), shown = document.getElementById("shown");
  const more = document.getElementById("more"), page = 50;
  let limit = page, column = 0, up = true;
  const apply = () => {
    const text = form.text.value.toLowerCase();
    const wanted = [...form.querySelectorAll("select")].map((s) => [Number(s.name), s.value]).filter(([, v]) => v);
    // A select's name is the index of its column. Columns 6 and 7 hold the prompt and the answer.
    const matching = rows.filter((row) => wanted.every(([i, v]) => row[i] === v)
      && (!text || row[6].toLowerCase().includes(text) || row[7].toLowerCase().includes(text)));
    matching.sort((a, b) => (up ? 1 : -1) * a[column].localeCompare(b[column], "en", { numeric: true }));
    body.replaceChildren(...matching.slice(0, limit).map((row) => {
      const line = document.createElement("tr");
      row.forEach((value, i) => {
        const cell = document.createElement("td");
        cell.textContent = value;
        if (i > 5) cell.dir = "auto";
        line.append(cell);
      });
      return line;
    }));
    shown.textContent = `${Math.min(limit, matching.length)} of ${matching.length} answers`;
    more.hidden = matching.length <= limit;
    document.querySelectorAll("th button").forEach((button) => {
      const here = Number(button.dataset.column) === column;
      button.parentElement.ariaSort = here ? (up ? "ascending" : "descending") : "none";
    });
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { limit = page; apply(); });
  more.addEventListener("click", () => { limit += page; apply(); });
  document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
    const chosen = Number(button.dataset.column);
    up = chosen === column ? !up : true;
    column = chosen;
    apply();
  }));
  apply();
})();
