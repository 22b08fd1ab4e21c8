(() => {
  const form = document.getElementById("filters");
  if (!form) return;
  const prompts = [...document.querySelectorAll("article.prompt")];
  const more = document.getElementById("more"), shown = document.getElementById("shown");
  const page = 20;
  let limit = page;
  const apply = () => {
    const stages = [...form.querySelectorAll("[name=stage]:checked")].map((box) => box.value);
    const set = form.elements.set.value, differs = form.elements.differs.checked;
    const text = form.elements.text.value.toLowerCase();
    // Cells of unticked stages are hidden even in prompts that match.
    document.querySelectorAll(".cell").forEach((cell) => { cell.hidden = !stages.includes(cell.dataset.stage); });
    // All prompts are counted, and only the first `limit` matching ones are shown.
    let matching = 0;
    for (const prompt of prompts) {
      const fits = (set === "all" || prompt.dataset.set === set)
        && (!differs || prompt.dataset.differs.split(" ").some((stage) => stages.includes(stage)))
        && (!text || prompt.textContent.toLowerCase().includes(text));
      matching += fits;
      prompt.hidden = !fits || matching > limit;
    }
    shown.textContent = `${Math.min(matching, limit)} of ${matching} prompts`;
    more.hidden = matching <= limit;
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { limit = page; apply(); });
  more.addEventListener("click", () => { limit += page; apply(); });
  form.hidden = false;
  apply();
})();
