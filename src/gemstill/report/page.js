// The pointer over a chart shows every line's value there; without scripts the charts stay whole.
const said = x => {
  for (const [size, prefix] of [[1e9, 'G'], [1e6, 'M'], [1e3, 'k']])
    if (Math.abs(x) >= size) return +(x / size).toPrecision(3) + prefix;
  return +x.toPrecision(4);
};
for (const figure of document.querySelectorAll('figure.chart')) {
  const data = JSON.parse(figure.querySelector('script').textContent), svg = figure.querySelector('svg');
  const cursor = figure.querySelector('.cursor'), tip = figure.querySelector('.tip'), [left, right] = data.box;
  const hide = () => { cursor.setAttribute('visibility', 'hidden'); tip.hidden = true; };
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const across = (event.clientX - box.left) * scale;
    if (across < left || across > right) return hide();
    const x = data.x[0] + (across - left) / (right - left) * (data.x[1] - data.x[0]);
    const near = data.series.map(s => [s, s.points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)]);
    tip.replaceChildren();
    const head = document.createElement('div');
    head.className = 'soft';
    head.textContent = said(x) + ' ' + data.unit;
    tip.append(head);
    for (const [s, point] of near) {
      if (Math.abs(point[0] - x) > (data.x[1] - data.x[0]) / 8) continue; // the line ends elsewhere
      const row = document.createElement('div'), key = document.createElement('span');
      key.className = 'key c' + s.color;
      row.append(key, s.name + '  ' + said(point[1]));
      tip.append(row);
    }
    cursor.setAttribute('x1', across); cursor.setAttribute('x2', across); cursor.setAttribute('visibility', 'visible');
    tip.hidden = false;
    const place = across / scale;
    tip.style.left = (place > box.width / 2 ? place - tip.offsetWidth - 12 : place + 12) + 'px';
  });
}
