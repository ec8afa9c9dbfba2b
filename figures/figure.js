// On a narrow screen titles and rows' names are broken into lines, panels stand one below the other, and the
// legend stands under them. Sizes are in pixels.
const NARROW = 640;

function broken(text, letters) {
  return text.split("<br>").map(part => part.split(" ").reduce((lines, word) => {
    const last = lines.length - 1;
    const fits = last >= 0 && lines[last].length + word.length < letters;
    return fits ? [...lines.slice(0, last), lines[last] + " " + word] : [...lines, word];
  }, []).join("<br>")).join("<br>");
}

// Lines under a title are wrapped at WRAP letters: what was wrapped there is one line again.
const WRAP = 100;
const unwrapped = text => text.split("<br>").reduce((lines, part) => {
  const last = lines.length - 1, first = part.split(" ")[0];
  const wrapped = last > 0 && lines[last].split("<wrap>").pop().length + 1 + first.length > WRAP;
  return wrapped ? [...lines.slice(0, last), lines[last] + "<wrap>" + part] : [...lines, part];
}, []).join("<br>").replaceAll("<wrap>", " ");

const lines = text => text.split("<br>").length;
const axisName = id => id[0] + "axis" + id.slice(1);

function narrowed(plot) {
  const full = plot._fullLayout, layout = plot.layout, changes = {};
  const title = (layout.title || {}).text || "", under = ((layout.title || {}).subtitle || {}).text || "";
  const text = broken(title, plot.clientWidth / 8.5), subtitle = broken(unwrapped(under), plot.clientWidth / 6.8);
  const top = full.margin.t + 20 * (lines(text) - lines(title)) + 15 * (lines(subtitle) - lines(under));
  let bottom = full.margin.b, right = Math.min(full.margin.r, 24), left = full.margin.l;
  Object.assign(changes, {"title.text": text, "title.subtitle.text": subtitle, "title.font.size": 15});

  // Names of rows, broken and smaller; a row is as high as its name.
  let tallest = 0;
  for (const axis of Object.values(full).filter(a => a && a._id && a._id[0] === "y")) {
    const name = axisName(axis._id), given = (layout[name] || {}).ticktext;
    changes[name + ".tickfont.size"] = 10;
    if (!given && axis.type !== "category") continue;
    const names = (given || axis._categories).map(row => broken(String(row).replaceAll("<br>", " "), 20));
    changes[name + ".ticktext"] = names;
    if (!given) changes[name + ".tickvals"] = axis._categories;
    left = Math.min(left, 70);
    const row = (full.height - full.margin.t - full.margin.b) * (axis.domain[1] - axis.domain[0]) / names.length;
    tallest = Math.max(tallest, (13 * Math.max(...names.map(lines)) + 4) / row);
  }
  const stretch = Math.max(1, tallest);

  // Panels in one column, by rows; each keeps its plot's height, and room for its own axis below.
  const panels = Object.values(full._plots || {}).map(p => ({x: p.xaxis, y: p.yaxis}));
  panels.sort((a, b) => b.y.domain[1] - a.y.domain[1] || a.x.domain[0] - b.x.domain[0]);
  const columns = new Set(panels.map(p => p.x.domain[0].toFixed(3))).size;
  const plotHeight = full.height - full.margin.t - full.margin.b;
  let height = full.height + (columns > 1 ? 0 : (stretch - 1) * plotHeight);
  if (columns > 1) {
    const gap = 84, old = panels.map(p => (p.y.domain[1] - p.y.domain[0]) * plotHeight * stretch);
    // A title that stands once for a row or a column of panels is needed at each of them.
    const titleOf = (letter, same) => {
      const titled = panels.find(p => same(p) && ((layout[axisName(p[letter]._id)] || {}).title || {}).text);
      return titled && layout[axisName(titled[letter]._id)].title.text;
    };
    const whole = old.reduce((a, b) => a + b, 0) + gap * (panels.length - 1);
    let above = 0;
    panels.forEach((panel, number) => {
      const [x, y] = [axisName(panel.x._id), axisName(panel.y._id)], was = [panel.x.domain, panel.y.domain];
      const now = [1 - (above + old[number]) / whole, 1 - above / whole];
      changes[x + ".domain"] = [0, 1];
      changes[y + ".domain"] = now;
      changes[x + ".anchor"] = panel.y._id;
      changes[y + ".anchor"] = panel.x._id;
      changes[x + ".showticklabels"] = changes[y + ".showticklabels"] = true;
      changes[x + ".title.text"] = titleOf("x", p => p.x.domain[0] === was[0][0]);
      if (panel.y.type !== "category") changes[y + ".title.text"] = titleOf("y", p => p.y.domain[1] === was[1][1]);
      if (panel.y.showticklabels === false && panel.y.matches) {
        const first = axisName(panel.y.matches);
        for (const key of ["tickvals", "ticktext"])
          if (changes[first + "." + key]) changes[y + "." + key] = changes[first + "." + key];
      }
      // A panel's own title stands over it, in the middle.
      (layout.annotations || []).forEach((note, n) => {
        const middle = (was[0][0] + was[0][1]) / 2;
        if (note.xref === "paper" && note.yref === "paper" && Math.abs(note.x - middle) < .01
            && Math.abs(note.y - was[1][1]) < .01)
          Object.assign(changes, {[`annotations[${n}].x`]: .5, [`annotations[${n}].y`]: now[1]});
      });
      above += old[number] + gap;
    });
    height += whole - plotHeight;
  }
  // Texts at the right end of lines and bars, that would need half of the width.
  (layout.annotations || []).forEach((note, n) => {
    if (note.xref !== "paper" && note.xanchor === "left") {
      changes[`annotations[${n}].text`] = broken(note.text || "", 18);
      changes[`annotations[${n}].font.size`] = 10;
      right = Math.max(right, note.xshift ? Math.min(full.margin.r, 100) : right);
    }
  });

  if (full.showlegend) {
    const names = [...new Set(plot.data.filter(t => t.showlegend !== false && t.name).map(t => t.name))];
    const rows = names.reduce((sum, name) => sum + 45 + 7 * name.length, 0) / (plot.clientWidth - 20);
    const room = 22 * Math.ceil(1.3 * rows) + 10;
    Object.assign(changes, {"legend.orientation": "h", "legend.x": 0, "legend.xanchor": "left",
      "legend.yref": "container", "legend.y": 0, "legend.yanchor": "bottom", "legend.font.size": 11});
    bottom = 60 + room;
    height += Math.max(0, bottom - full.margin.b);
  }
  (layout.updatemenus || []).forEach((menu, n) => {  // below the title of the axis, not beside it
    changes[`updatemenus[${n}].y`] = menu.y - 34 / plotHeight;
    bottom += 40;
    height += 40;
  });
  height += top - full.margin.t;
  for (const axis of Object.values(full).filter(a => a && a._id && a._id[0] === "x")) {
    const name = axisName(axis._id), under = changes[name + ".title.text"] || ((layout[name] || {}).title || {}).text;
    const letters = (axis._categories || []).join("  ").length;
    changes[name + ".tickangle"] = 7 * letters > plot.clientWidth - left - right ? -90 : 0;
    if (axis.tickmode === "auto" && axis.type === "linear") changes[name + ".nticks"] = 5;
    if (under) changes[name + ".title.text"] = broken(under, (plot.clientWidth - left - right) / 7);
  }
  changes["title.y"] = 1 - .04 * full.height / height;  // as far from the top as before
  return {...changes, height, "margin.t": top, "margin.b": bottom, "margin.r": right, "margin.l": left};
}

function narrow(plot) {
  if (plot.clientWidth >= NARROW) return;
  const changes = narrowed(plot);
  Plotly.relayout(plot, changes).then(() => window.parent.postMessage({reclibHeight: changes.height}, "*"));
}
