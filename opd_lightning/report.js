"use strict";
// What the pointer or a finger is on: the teacher's likeliest steps, or the values of a chart's curves.
const tip = document.getElementById("tip");

function show(lines, event) {
  tip.replaceChildren(...lines.map(([name, value, kind]) => {
    const row = document.createElement("div");
    if (kind) row.className = kind;
    for (const text of [name, value]) row.appendChild(document.createElement("span")).textContent = text;
    return row;
  }));
  tip.hidden = false;
  const left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 16;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? Math.max(8, event.clientY - tip.offsetHeight - 12) : below}px`;
}

function visible(text) {
  return text === "" ? "(empty)" : text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

function ofStep(step, event) {
  const [taken, ...likeliest] = JSON.parse(step.dataset.l);
  const lines = likeliest.map(([text, share]) => [visible(text), share, text === step.textContent ? "taken" : ""]);
  show([[`${visible(step.textContent)} (written)`, taken[1], "head"], ...lines], event);
}

function ofChart(chart, event) {
  chart.curves ??= JSON.parse(chart.dataset.points);
  const box = chart.getBoundingClientRect();
  const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
  const near = chart.curves.map(({label, points}) =>
    [label, points.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best)]);
  const at = near.map(([, point]) => point).reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
  chart.querySelector(".pointer").setAttribute("d", `M${at[0]} 8V206`);
  show([["", String(at[1]), "head"], ...near.map(([label, point]) => [label, String(point[2]), ""])], event);
}

function look(event) {
  const step = event.target.closest("i[data-l]");
  const chart = event.target.closest("svg[data-points]");
  for (const line of document.querySelectorAll(".pointer[d^=M]")) line.setAttribute("d", "");
  if (step) ofStep(step, event);
  else if (chart) ofChart(chart, event);
  else tip.hidden = true;
}

for (const kind of ["pointermove", "click"]) document.addEventListener(kind, look);
