// Runs in every page before the page's own scripts: what is random or of today made fixed, and `renderer`, which Python calls.
(() => {
  // jQuery UI marks today in its calendars; the clock still runs, because animations wait for it
  const noon = Date.UTC(2020, 0, 15, 12);
  const RealDate = Date;
  window.Date = class extends RealDate {
    constructor(...parts) {
      if (parts.length) super(...parts);
      else super(noon + performance.now());
    }
    static now() {
      return noon + performance.now();
    }
  };
  // for what a page draws while it loads, before it can be seeded
  let state = 1;
  Math.random = () => (state = (state * 16807) % 2147483647) / 2147483647;

  const AREA = { left: 0, top: 50, right: 160, bottom: 210 };
  const NOT_OF_THE_TASK = '#query, #reward-display, #sync-task-cover, #click-canvas';
  const FRAME = ['wrap', 'area'];
  const WITHOUT_A_PICTURE = new Set(['br', 'script', 'style', 'option', 'defs', 'template']);
  const INTERACTIVE =
    'a, button, input, textarea, select, [onclick], [tabindex], [role=tab], [role=button], [role=menuitem], [role=option]';

  const tidy = (text) => (text || '').replace(/\s+/g, ' ').trim();

  const shownText = (element) =>
    tidy(element instanceof HTMLElement ? element.innerText : element.textContent) ||
    (['submit', 'button', 'reset'].includes(element.type) ? tidy(element.value) : '');

  const label = (element) =>
    shownText(element) ||
    ['aria-label', 'title', 'alt', 'placeholder', 'name', 'id'].map((name) => tidy(element.getAttribute(name))).find(Boolean) ||
    '';

  const rectangle = ({ left, top, right, bottom }) => [left, top, right, bottom];

  const clipped = ([left, top, right, bottom]) => [
    Math.max(left, AREA.left),
    Math.max(top, AREA.top),
    Math.min(right, AREA.right),
    Math.min(bottom, AREA.bottom),
  ];

  const center = ([left, top, right, bottom]) => [(left + right) / 2, (top + bottom) / 2];

  const isOnTop = (element, box) => {
    const hit = document.elementFromPoint(...center(box));
    return hit !== null && element.contains(hit);
  };

  // of a label with its checkbox or radio button; of anything else that holds text, without a field beside it
  const textBox = (element, whole) => {
    if (!(element instanceof HTMLElement) || !element.textContent.trim()) return whole;
    const range = document.createRange();
    range.selectNodeContents(element);
    const own = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (own.length && !element.matches('label')) {
      range.setStartBefore(own[0]);
      range.setEndAfter(own[own.length - 1]);
    }
    return rectangle(range.getBoundingClientRect());
  };

  // jQuery UI moves the text of its icon buttons out of sight with an indent
  const readable = (element, whole) => {
    const [left, top, right, bottom] = textBox(element, whole);
    const isInside = left < whole[2] && right > whole[0] && top < whole[3] && bottom > whole[1];
    return isInside ? shownText(element) : '';
  };

  const describe = (element) => {
    const whole = rectangle(element.getBoundingClientRect());
    const box = clipped(whole);
    if (box[2] - box[0] < 4 || box[3] - box[1] < 4) return null;
    const style = getComputedStyle(element);
    if (style.visibility !== 'visible' || style.opacity < 0.1 || !isOnTop(element, box)) return null;
    const text = readable(element, whole);
    return {
      tag: element.tagName.toLowerCase(),
      text,
      label: label(element),
      whole,
      box,
      text_box: textBox(element, whole),
      interactive: element.matches(INTERACTIVE),
      holds_text: text !== '' && ![...element.children].some(shownText),
      lines: element.getClientRects().length,
    };
  };

  const start = (seed) => {
    if (window.jQuery) jQuery.fx.off = true;
    core.EPISODE_MAX_TIME = 1e8;
    Math.seedrandom(seed);
    core.startEpisodeReal();
    if (document.activeElement) document.activeElement.blur();
  };

  const press = (element, x, y) => {
    const event = { bubbles: true, cancelable: true, composed: true, view: window, clientX: x, clientY: y, detail: 1 };
    element.dispatchEvent(new PointerEvent('pointerdown', event));
    element.dispatchEvent(new MouseEvent('mousedown', event));
    const focused = element.closest('input, textarea, select, button, a[href], [tabindex]');
    if (focused) focused.focus();
    element.dispatchEvent(new PointerEvent('pointerup', event));
    element.dispatchEvent(new MouseEvent('mouseup', event));
    element.dispatchEvent(new MouseEvent('click', event));
  };

  // the same element again after the page was seeded again, or null where the page did not come back as it was
  const find = ({ tag, whole }) => {
    const same = (element) =>
      element.tagName.toLowerCase() === tag &&
      rectangle(element.getBoundingClientRect()).every((edge, i) => Math.abs(edge - whole[i]) < 0.01);
    let element = document.elementFromPoint(...center(clipped(whole)));
    while (element && !same(element)) element = element.parentElement;
    return element;
  };

  const reward = () => (WOB_DONE_GLOBAL ? WOB_RAW_REWARD_GLOBAL : 0);

  // as a word of its own, in the case in which it is written
  const isNamed = (text) => text !== '' && ` ${core.getUtterance()} `.includes(` ${text} `);

  const place = (selector) => {
    const all = [...document.querySelectorAll(selector)];
    const element = all.length > 1 ? all.find((one) => isNamed(shownText(one))) : all[0];
    if (!element) return null;
    const box = clipped(rectangle(element.getBoundingClientRect()));
    return box[2] - box[0] < 4 || box[3] - box[1] < 4 || !isOnTop(element, box) ? null : box;
  };

  window.renderer = {
    start,
    reward,
    place,
    outcome: () => (WOB_DONE_GLOBAL ? WOB_RAW_REWARD_GLOBAL : null),
    // pages of free wording return their fields along with the words
    instruction: () => core.getUtterance().utterance || core.getUtterance(),
    elements: () =>
      [...document.body.querySelectorAll('*')]
        .filter((element) => !element.closest(NOT_OF_THE_TASK) && !FRAME.includes(element.id))
        .filter((element) => !WITHOUT_A_PICTURE.has(element.tagName.toLowerCase()))
        .map(describe)
        .filter(Boolean),
    rewards: (seed, candidates) =>
      candidates.map((candidate) => {
        start(seed);
        const [x, y] = center(candidate.box);
        if (find(candidate) === null) return 0;
        press(document.elementFromPoint(x, y), x, y);
        return reward();
      }),
    ready: (seed, candidate) => {
      start(seed);
      return find(candidate) !== null;
    },
  };
})();
