// Small lines of the last minutes. A stretch that is not known is a gap.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 200;
const HEIGHT = 40;

export class Sparkline {
  #points = [];

  /** `spanS`: seconds that are shown. */
  constructor(box, name, unit, spanS = 120) {
    Object.assign(this, { name, unit, spanS });
    this.svg = document.createElementNS(SVG, "svg");
    this.svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    this.svg.setAttribute("preserveAspectRatio", "none");
    this.svg.setAttribute("role", "img");
    this.area = this.svg.appendChild(document.createElementNS(SVG, "path"));
    this.area.setAttribute("class", "area");
    this.line = this.svg.appendChild(document.createElementNS(SVG, "path"));
    this.line.setAttribute("class", "line");
    box.replaceChildren(this.svg);
  }

  /** `value` may be null. */
  add(atS, value) {
    this.#points.push([atS, value]);
    this.#points = this.#points.filter(([at]) => at > atS - this.spanS);
    this.#draw(atS);
  }

  #draw(nowS) {
    const values = this.#points.map(([, v]) => v).filter((v) => v !== null);
    const most = Math.max(...values, 1e-9);
    const x = (at) => (WIDTH * (1 - (nowS - at) / this.spanS)).toFixed(1);
    const y = (v) => (HEIGHT - 2 - ((HEIGHT - 6) * v) / most).toFixed(1);
    let line = "";
    let area = "";
    let run = [];
    const close = () => {
      if (run.length) {
        const steps = run.map(([at, v]) => `${x(at)} ${y(v)}`).join("L");
        line += `M${steps}${run.length === 1 ? "h.1" : ""}`;
        area += `M${x(run[0][0])} ${HEIGHT}L${steps}L${x(run.at(-1)[0])} ${HEIGHT}Z`;
      }
      run = [];
    };
    for (const point of this.#points) {
      // Where nobody looked for a while, e.g. because the page was hidden, nothing is known either.
      if (point[1] === null || (run.length && point[0] - run.at(-1)[0] > 10)) close();
      if (point[1] !== null) run.push(point);
    }
    close();
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", area);
    const told = values.length
      ? `from ${Math.min(...values).toPrecision(3)} to ${Math.max(...values).toPrecision(3)} ${this.unit}`
      : "nothing known";
    this.svg.setAttribute("aria-label", `${this.name}, last ${this.spanS / 60} minutes: ${told}`);
  }
}
