// Elements of the page.

export const $ = (id) => document.getElementById(id);

// Where fingers type, Enter is a new line, and the keyboard on the screen is not brought up unasked.
export const touch = matchMedia("(pointer: coarse)").matches;

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export function button(text, onClick, className = "quiet") {
  const made = element("button", className, text);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

export function image(picture, text) {
  const made = element("img");
  made.src = picture.url;
  made.alt = text;
  return made;
}

// The composer and the header stand still: to show what has the keyboard, nothing need scroll there.
export function focus(node) {
  node.focus({ preventScroll: true });
}

// Words in a box of their own, and what to do about them; without words there is no box.
export function tell(box, text, ...buttons) {
  box.replaceChildren(...(text ? [element("span", "", text), ...buttons] : []));
  box.hidden = !text;
}
