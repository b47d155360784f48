// Uses an explorer page as a visitor would, in headless Chromium, and prints what it saw as JSON.
// Usage: node drive_page.cjs PAGE CHROMIUM PLAN [SCREENSHOTS], with puppeteer-core (and axe-core) to be found by `require`.
// PLAN: JSON {grid, a, b, upto, flags}: the grid to choose, the cells to swap, a scale to decode up to, flags of the browser.
"use strict";
const { pathToFileURL } = require("node:url");
const path = require("node:path");
const puppeteer = require("puppeteer-core");

const [page, executablePath, planText, screenshots] = process.argv.slice(2);
const plan = JSON.parse(planText);

async function axeSource() {
  try {
    return require("node:fs").readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
  } catch {
    return null;
  }
}

async function main() {
  const browser = await puppeteer.launch({
    executablePath,
    headless: true,
    args: ["--no-sandbox", "--disable-dev-shm-usage", "--force-device-scale-factor=1", ...(plan.flags ?? [])],
    protocolTimeout: 240000,
  });
  const tab = await browser.newPage();
  const seen = { requests: [], errors: [], images: {}, widths: {}, axe: null };
  tab.on("request", (request) => seen.requests.push(new URL(request.url()).protocol));
  tab.on("pageerror", (error) => seen.errors.push(String(error)));
  tab.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));

  const settled = () => tab.waitForFunction(() => document.body.dataset.busy === "0", { timeout: 240000 });
  const pixels = (panel) =>
    tab.$eval(`#panel-${panel} .stage canvas`, (canvas) => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return Array.from(data);
    });
  const keep = async (name) => {
    await settled();
    for (const panel of ["a", "b"]) seen.images[`${name} ${panel}`] = await pixels(panel);
  };
  const shot = async (name) => {
    if (screenshots) await tab.screenshot({ path: path.join(screenshots, `${name}.png`), fullPage: true });
  };
  const cell = (panel, index) => `#panel-${panel} .cell[data-index="${index}"]`;

  await tab.setViewport({ width: 1440, height: 900 });
  await tab.goto(pathToFileURL(page).href);
  await tab.waitForFunction(() => document.body.dataset.ready, { timeout: 240000 });
  seen.ready = await tab.$eval("body", (body) => body.dataset.ready);
  seen.status = await tab.$eval("#status", (status) => status.textContent);
  seen.options = await tab.$$eval("#panel-a option", (options) => options.length);
  await keep("plain");

  await tab.click(`#grids input[value="${plan.grid}"]`);
  await tab.hover(cell("a", plan.a));
  seen.where = await tab.$eval("#where-text", (text) => text.textContent);
  seen.same = await tab.$$eval("#panel-a .same", (cells) => cells.map((each) => Number(each.dataset.index)));
  await tab.click(cell("a", plan.a));
  await tab.click(cell("b", plan.b));
  await shot("1440");
  await tab.click("#swap");
  await keep("swapped");
  seen.changed = await tab.$$eval(".changed", (cells) => cells.map((each) => Number(each.dataset.index)));

  const setUpto = (value) =>
    tab.$eval("#upto", (input, to) => ((input.value = to), input.dispatchEvent(new Event("input"))), String(value));
  await setUpto(plan.upto);
  await keep("coarse");
  await setUpto(await tab.$eval("#upto", (input) => input.max));
  await settled();

  await tab.focus(cell("b", plan.b));
  await tab.keyboard.press("ArrowLeft");
  seen.focused = await tab.evaluate(() => document.activeElement.getAttribute("aria-label"));

  const source = await axeSource();
  for (const scheme of ["light", "dark"])
    for (const width of [1440, 375]) {
      await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
      await tab.setViewport({ width, height: 900 });
      await tab.click("#colours");
      seen.widths[`${scheme} ${width}`] = await tab.evaluate(() => document.documentElement.scrollWidth);
      await shot(`${scheme}-${width}`);
      if (!source) continue;
      seen.axe ??= [];
      if (!(await tab.evaluate("typeof axe !== 'undefined'"))) await tab.evaluate(source);
      const found = await tab.evaluate(async () => (await axe.run()).violations);
      seen.axe.push(...found.map(({ id, impact, nodes }) => `${impact} ${id} ${nodes[0].html.slice(0, 160)}`));
    }
  await tab.click("#reset");
  await keep("reset");
  await browser.close();
  process.stdout.write(JSON.stringify(seen));
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
