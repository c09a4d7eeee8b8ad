// The interactive example of the start page: three losses of one row in a batch of four.
"use strict";

// The other rows of the batch, and the labels of all; the first row is the one that is moved.
const OTHERS = [[2, -1, -1], [0, 1.5, -1.5], [0.5, 0, -0.5]];
const LABELS = [0, 0, 1, 2];

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const sumExp = (f) => f.reduce((sum, value) => sum + Math.exp(value), 0);
const softmax = (f) => f.map((value) => Math.exp(value) / sumExp(f));

/** Value, gradient, weight relative to the mean, and probabilities of the first row. */
function evaluate(first, alpha, beta) {
  const batch = [first, ...OTHERS];
  const label = batch.map((f, row) => f[LABELS[row]]);
  const is = first.map((_, j) => (j === LABELS[0] ? 1 : 0));
  const boost = label.map((value) => Math.exp(-alpha * value));
  const partition = batch.map(sumExp);
  const weight = boost[0] / mean(boost);
  const p = softmax(first);
  const scaled = softmax(first.map((value) => (1 + alpha) * value));

  const rho = (alpha * mean(boost)) / mean(partition);
  const power = partition.map((z) => z ** beta);
  const push = power[0] / mean(power);
  const a = Math.log(mean(boost)) / alpha;
  const b = Math.log(mean(power)) / beta;
  return {
    "Cross-entropy": {
      value: Math.log(partition[0]) - label[0],
      gradient: first.map((_, j) => p[j] - is[j]),
      weight: 1,
      p,
    },
    PENEX: {
      value: (boost[0] + rho * partition[0]) / alpha,
      gradient: first.map((f, j) => (rho * Math.exp(f)) / alpha - boost[0] * is[j]),
      weight,
      p: scaled,
    },
    "log-PENEX": {
      value: a + b + (weight - 1) / alpha + (push - 1) / beta,
      gradient: first.map((_, j) => push * p[j] - weight * is[j]),
      weight,
      p: scaled,
    },
  };
}

function show(root) {
  const inputs = [
    ["f0", "Logit of A, the label", -4, 4, 0.1, -1],
    ["f1", "Logit of B", -4, 4, 0.1, 1],
    ["f2", "Logit of C", -4, 4, 0.1, 0],
    ["alpha", "α (PENEX, log-PENEX)", -2, 0, 0.05, -1],
    ["beta", "power β (log-PENEX)", -2, 3, 0.1, 0],
  ];
  const actual = { alpha: (value) => 10 ** value, beta: (value) => 2 ** value };
  root.innerHTML =
    inputs
      .map(
        ([name, text, least, most, step, start]) =>
          `<label><span>${text}</span><input type="range" name="${name}" min="${least}" max="${most}"
           step="${step}" value="${start}"><output></output></label>`,
      )
      .join("") + '<div class="pst-scrollable-table-container"><table class="table"></table></div>';
  const table = root.querySelector("table");

  function update() {
    const value = {};
    for (const input of root.querySelectorAll("input")) {
      value[input.name] = (actual[input.name] || Number)(Number(input.value));
      input.nextElementSibling.value = value[input.name].toFixed(input.name in actual ? 2 : 1);
    }
    const losses = evaluate([value.f0, value.f1, value.f2], value.alpha, value.beta);
    const bar = (share) => `<td><meter min="0" max="1" value="${share}"></meter> ${share.toFixed(2)}</td>`;
    const number = (x) => `<td>${x.toFixed(2).replace("-", "−")}</td>`;
    table.innerHTML =
      "<thead><tr><th>Loss</th><th>Value</th><th>Weight</th><th>p(A)</th><th>p(B)</th><th>p(C)</th>" +
      "<th>∂/∂f(A)</th><th>∂/∂f(B)</th><th>∂/∂f(C)</th></tr></thead><tbody>" +
      Object.entries(losses)
        .map(
          ([name, loss]) =>
            `<tr><th scope="row">${name}</th>${number(loss.value)}${number(loss.weight)}` +
            `${loss.p.map(bar).join("")}${loss.gradient.map(number).join("")}</tr>`,
        )
        .join("") +
      "</tbody>";
  }
  root.addEventListener("input", update);
  update();
}

if (typeof module !== "undefined") module.exports = { evaluate };
else document.addEventListener("DOMContentLoaded", () => {
  const root = document.getElementById("playground");
  if (root) show(root);
});
