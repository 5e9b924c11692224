"use strict";

// Unpacks plotly.js, draws every figure of the embedded data in the page's colours, and keeps to
// them when the reader turns dark mode on or prints.
const { sections } = JSON.parse(document.getElementById("data").textContent);
const plots = [];

function colours() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(`--${name}`).trim();
}

function template() {
  const colour = colours();
  const axis = {
    gridcolor: colour("grid"),
    zerolinecolor: colour("grid"),
    linecolor: colour("rule"),
    tickcolor: colour("rule"),
    automargin: true,
  };
  const surface = { bgcolor: colour("paper"), bordercolor: colour("rule"), font: { color: colour("ink") } };
  return {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      xaxis: axis,
      yaxis: axis,
      hoverlabel: surface,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("accent") },
    },
  };
}

function draw(div, figure) {
  const layout = { ...figure.layout, template: template() };
  Plotly.newPlot(div, figure.data, layout, { responsive: true, displaylogo: false });
  plots.push(div);
  const slider = div.closest("figure").querySelector("input[type=range]");
  slider?.addEventListener("input", () => show(div, figure.frames[slider.value]));
}

function show(div, frame) {
  div.closest("figure").querySelector("output").textContent = frame.label;
  frame.traces.forEach((changed, trace) => {
    const wrapped = Object.entries(changed).map(([name, values]) => [name, [values]]);
    Plotly.restyle(div, Object.fromEntries(wrapped), [trace]);
  });
}

function recolour(size) {
  for (const div of plots) Plotly.relayout(div, { template: template(), ...size });
}

async function unpack(id) {
  const packed = atob(document.getElementById(id).textContent);
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(unpacked).text();
  document.head.append(script);
}

function each(what) {
  sections.forEach((section, s) =>
    section.figures.forEach((figure, f) =>
      what(document.getElementById(`s${s + 1}f${f + 1}`), figure)));
}

const tooOld = "This browser cannot unpack the figures (it lacks DecompressionStream): open the page in a newer one.";
unpack("plotly").then(() => each(draw), () => each((div) => { div.textContent = tooOld; }));

for (const query of ["(prefers-color-scheme: dark)", "print"])
  matchMedia(query).addEventListener("change", () => recolour({}));

// Paper is narrower than most screens, and cannot be clicked.
const PAPER = 680;
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((element) => { element.open = true; });
  recolour({ width: PAPER });
});
addEventListener("afterprint", () => recolour({ width: null, autosize: true }));
