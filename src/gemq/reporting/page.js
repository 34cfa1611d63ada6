"use strict";
// Tooltips for the pointer and the keyboard. Everything else on the page works without this script.
const record = JSON.parse(document.getElementById("gemq-record").textContent);
const tip = document.getElementById("tip");

function show(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 4)) + "px";
  tip.style.top = (y + 16 + tip.offsetHeight > innerHeight ? y - 12 - tip.offsetHeight : y + 16) + "px";
}

function hide() {
  tip.hidden = true;
}

for (const point of document.querySelectorAll("[data-tip]")) {
  const showPoint = () => {
    const box = point.getBoundingClientRect();
    show(point.dataset.tip, box.right, box.bottom - 16);
  };
  point.addEventListener("pointerenter", showPoint);
  point.addEventListener("focus", showPoint);
  point.addEventListener("pointerleave", hide);
  point.addEventListener("blur", hide);
}

function addMapTips(map) {
  const layers = record.checkpoint.layers;
  const tokens = record.job && record.job.expert_tokens;
  const cursor = map.querySelector(".cursor");
  let row = 0;
  let column = 0;

  function showCell() {
    const layer = layers[row];
    const box = map.getBoundingClientRect();
    column = Math.min(column, layer[map.dataset.matrix].length - 1);
    cursor.setAttribute("x", column);
    cursor.setAttribute("y", row);
    cursor.style.visibility = "visible";
    let text = `layer ${layer.name}, expert ${column}: ${layer[map.dataset.matrix][column]} bits`;
    if (tokens) text += `, ${tokens[row][column].toLocaleString("en")} calibration tokens`;
    show(
      text,
      box.left + (box.width * (column + 1)) / Number(map.dataset.columns),
      box.top + (box.height * (row + 1)) / layers.length - 8,
    );
  }

  function hideCell() {
    cursor.style.visibility = "hidden";
    hide();
  }

  map.addEventListener("pointermove", (event) => {
    const box = map.getBoundingClientRect();
    const cell = (position, count) => Math.max(0, Math.min(count - 1, Math.floor(position * count)));
    column = cell((event.clientX - box.left) / box.width, Number(map.dataset.columns));
    row = cell((event.clientY - box.top) / box.height, layers.length);
    showCell();
  });
  map.addEventListener("pointerleave", hideCell);
  map.addEventListener("focus", showCell);
  map.addEventListener("blur", hideCell);
  map.addEventListener("keydown", (event) => {
    const last = layers[row][map.dataset.matrix].length - 1;
    if (event.key === "ArrowLeft") column = Math.max(0, column - 1);
    else if (event.key === "ArrowRight") column = Math.min(last, column + 1);
    else if (event.key === "ArrowUp") row = Math.max(0, row - 1);
    else if (event.key === "ArrowDown") row = Math.min(layers.length - 1, row + 1);
    else if (event.key === "Home") column = 0;
    else if (event.key === "End") column = last;
    else if (event.key === "Escape") return hideCell();
    else return;
    event.preventDefault();
    showCell();
  });
}

document.querySelectorAll("svg.map").forEach(addMapTips);
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
