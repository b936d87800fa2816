/* What the site's search shows first, and what it quotes. Sphinx puts this into what it loads before searchtools.js. */
var Scorer = {
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
  // A page whose own title has words of the query comes before sections whose title has, and these before mentions.
  score: ([, title, anchor, , score]) => {
    const query = new URLSearchParams(location.search).get("q") || "";
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    return score + (anchor ? 10 : 100) * words.filter((word) => title.toLowerCase().includes(word)).length;
  },
};

// Quotations are sentences: no code, no output, no formulas but short ones, and these without their backslashes.
document.addEventListener("DOMContentLoaded", () => {
  const plain = Search.htmlToText;
  Search.htmlToText = (text, anchor) => {
    const page = new DOMParser().parseFromString(text, "text/html");
    page.querySelectorAll("div.math, .cell, .blx, pre").forEach((node) => node.remove());
    page.querySelectorAll("span.math").forEach((node) => {
      node.textContent = node.textContent.replace(/\\[()]|[{}]/g, "").replace(/\\[,;!]/g, " ").replaceAll("\\", "");
    });
    return plain(page.documentElement.outerHTML, anchor);
  };
});
