(() => {
  for (const numbers of document.querySelectorAll("details.numbers")) {
    const search = numbers.querySelector("input"), rows = [...numbers.querySelectorAll("tbody tr")];
    search.addEventListener("input", () => {
      const words = search.value.toLowerCase().split(/\s+/);
      for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    });
    search.hidden = false;
  }
})();
