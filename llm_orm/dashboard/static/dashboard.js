"use strict";

// Charts, the switch between light and dark, and the refresh. All else works without.

const THEME = "llm_orm_theme";

function colorOf(name) {
  const probe = document.createElement("i");
  probe.className = name;
  probe.hidden = true;
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

const SHOW = {
  money: (value) => "$" + value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 4 }),
  number: (value) => value.toLocaleString("en-US"),
  ms: (value) => (value < 1000 ? value.toFixed(0) + " ms" : (value / 1000).toFixed(value < 10000 ? 2 : 1) + " s"),
};

const TICK = {
  money: (value) => "$" + value.toLocaleString("en-US", { maximumFractionDigits: 4 }),
  number: (value) => value.toLocaleString("en-US", { notation: "compact" }),
  ms: (value) => (value < 1000 ? value + " ms" : value / 1000 + " s"),
};

function widthOf(texts, font) {
  const context = document.createElement("canvas").getContext("2d");
  context.font = font;
  return Math.ceil(Math.max(...texts.map((text) => context.measureText(text).width)));
}

// What stands on what: each series with those below it added, so that the highest is drawn first.
function stacked(series) {
  const below = series[0].values.map(() => 0);
  return series.map((each) => each.values.map((value, index) => (below[index] += value || 0))).reverse();
}

function drawn(figure) {
  const data = JSON.parse(figure.querySelector('script[type="application/json"]').textContent);
  const place = figure.querySelector(".plot");
  const isBars = data.kind === "bars";
  const order = isBars ? [...data.series].reverse() : data.series;
  const values = isBars ? stacked(data.series) : data.series.map((each) => each.values);
  const muted = colorOf("probe-muted");
  const line = colorOf("probe-line");
  const count = data.labels.length;
  const font = "12px system-ui, sans-serif";
  // An hour's day stands below it, where it is another than that of the label before.
  const ticks = data.hours.length ? data.hours.map(([, hour]) => hour) : data.labels;
  const named = (at) => at.map((index, place) => {
    if (!Number.isInteger(index) || !ticks[index]) return "";
    const day = data.hours[index]?.[0];
    return day && day !== data.hours[at[place - 1]]?.[0] ? `${ticks[index]}\n${day}` : ticks[index];
  });
  const widest = widthOf([...ticks, ...data.hours.map(([day]) => day)], font);
  const bars = isBars ? uPlot.paths.bars({ size: [0.72, 44], radius: 0.08 }) : undefined;
  const plot = new uPlot(
    {
      width: place.clientWidth,
      height: place.clientHeight,
      legend: { show: false },
      padding: [null, (u) => Math.max(8, widest / 2 - ((isBars ? 0.5 : 0.2) * (u.width - 70)) / count), null, null],
      cursor: { y: false, drag: { x: false, y: false }, points: { show: !isBars } },
      scales: {
        x: { time: false, range: () => (isBars ? [-0.6, count - 0.4] : [-0.2, count - 0.8]) },
        y: { range: (u, low, high) => [0, high > 0 ? high * 1.08 : 1] },
      },
      axes: [
        {
          stroke: muted, font, gap: 6, size: data.hours.length ? 44 : 30,
          grid: { show: false }, ticks: { show: false },
          incrs: [1, 2, 3, 4, 6, 7, 12, 14, 24, 28, 56, 112, 365],
          space: widest + 14,
          values: (u, at) => named(at),
        },
        {
          stroke: muted, font, gap: 6, size: 62, space: 36,
          grid: { stroke: line, width: 1 }, ticks: { show: false },
          incrs: data.unit === "number" ? [1, 2, 5].flatMap((n) => Array.from({ length: 14 }, (_, e) => n * 10 ** e)).sort((a, b) => a - b) : undefined,
          values: (u, at) => at.map(TICK[data.unit]),
        },
      ],
      series: [
        {},
        ...order.map((each) => {
          const color = colorOf(each.color);
          return {
            label: each.label, stroke: color, fill: isBars ? color : undefined, width: isBars ? 0 : 2,
            paths: bars, points: { show: !isBars && count === 1 }, spanGaps: true,
          };
        }),
      ],
      hooks: { setCursor: [(u) => tell(u, data, place)] },
    },
    [data.labels.map((_, index) => index), ...values],
    place,
  );
  figure.plot = plot;
}

function tell(plot, data, place) {
  let tip = place.querySelector(".tip");
  const index = plot.cursor.idx;
  if (index == null || plot.cursor.left < 0) {
    tip?.remove();
    return;
  }
  if (!tip) {
    tip = document.createElement("div");
    tip.className = "tip";
    place.append(tip);
  }
  const head = document.createElement("b");
  head.textContent = data.labels[index];
  const lines = data.series.filter((each) => each.values[index]).map((each) => {
    const row = document.createElement("p");
    const swatch = document.createElement("i");
    const name = document.createElement("span");
    const value = document.createElement("em");
    swatch.className = "swatch " + each.color;
    name.textContent = each.label;
    value.textContent = SHOW[data.unit](each.values[index]);
    row.append(swatch, name, value);
    return row;
  });
  tip.replaceChildren(head, ...lines);
  const left = plot.cursor.left + plot.over.offsetLeft;
  const room = place.clientWidth - tip.offsetWidth;
  tip.style.left = Math.max(0, Math.min(left + 14, left + 14 > room ? left - tip.offsetWidth - 14 : room)) + "px";
}

const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const plot = target.closest("[data-chart]").plot;
    if (plot && target.clientWidth && plot.width !== target.clientWidth) {
      plot.setSize({ width: target.clientWidth, height: target.clientHeight });
    }
  }
});

function drawAll() {
  sizes.disconnect();
  for (const figure of document.querySelectorAll("[data-chart]")) {
    const place = figure.querySelector(".plot");
    if (!place) continue;
    figure.plot?.destroy();
    drawn(figure);
    sizes.observe(place);
  }
}

function say(text) {
  document.getElementById("said").textContent = text;
}

// Light and dark

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function prepareTheme() {
  const button = document.querySelector("[data-theme-toggle]");
  button.hidden = false;
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    const path = (document.body.dataset.root || "") + "/";
    document.cookie = `${THEME}=${theme}; path=${path}; max-age=31536000; samesite=strict`;
    say(theme === "dark" ? "Dark" : "Light");
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
}

// The refresh: the content of the page is fetched anew, and everything else stays where it is.

const MEANS = "a, button, summary, input, select, [tabindex]";

function focusIn(main) {
  const focused = document.activeElement;
  return main.contains(focused) ? [...main.querySelectorAll(MEANS)].indexOf(focused) : -1;
}

async function refresh() {
  const main = document.getElementById("content");
  let answer;
  try {
    answer = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-store" });
  } catch {
    say("Could not refresh: the server does not answer");
    return false;
  }
  if (new URL(answer.url).pathname !== location.pathname) {
    location.assign(answer.url);
    return false;
  }
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("content");
  if (!answer.ok || !fresh) {
    say("Could not refresh: " + (fresh?.querySelector("h1")?.textContent ?? answer.status));
    return false;
  }
  const focused = focusIn(main);
  const open = [...main.querySelectorAll("details")].map((each) => each.open);
  const scrolled = [...main.querySelectorAll(".scroll, pre")].map((each) => [each.scrollLeft, each.scrollTop]);
  const top = scrollY;
  main.querySelectorAll("[data-chart]").forEach((figure) => figure.plot?.destroy());
  main.replaceChildren(...fresh.childNodes);
  main.querySelectorAll("details").forEach((each, index) => (each.open = open[index] ?? each.open));
  main.querySelectorAll(".scroll, pre").forEach((each, index) => {
    [each.scrollLeft, each.scrollTop] = scrolled[index] ?? [0, 0];
  });
  if (focused >= 0) main.querySelectorAll(MEANS)[focused]?.focus({ preventScroll: true });
  drawAll();
  scrollTo(scrollX, top);
  main.dataset.refreshed = Number(main.dataset.refreshed || 0) + 1;
  return true;
}

function prepareRefresh() {
  const seconds = Number(document.body.dataset.refresh);
  if (!seconds) return;
  const sign = document.querySelector("[data-live]");
  const tick = async () => {
    if (!document.hidden) {
      const isFresh = await refresh();
      sign.classList.toggle("paused", !isFresh);
      sign.textContent = isFresh ? `Live, as of ${new Date().toLocaleTimeString()}` : "Not refreshed";
    }
    setTimeout(tick, seconds * 1000);
  };
  setTimeout(tick, seconds * 1000);
  say(`The page is refreshed every ${seconds} seconds`);
}

// One panel of the bar at a time, closed by Escape and by a click elsewhere.

function preparePanels() {
  const panels = [...document.querySelectorAll(".bar details")];
  document.addEventListener("keydown", (event) => {
    const open = panels.find((each) => each.open);
    if (event.key === "Escape" && open) {
      open.open = false;
      open.querySelector("summary").focus();
    }
  });
  document.addEventListener("click", (event) => {
    for (const each of panels) if (!each.contains(event.target)) each.open = false;
  });
}

document.querySelector(".top [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
prepareTheme();
preparePanels();
drawAll();
prepareRefresh();
