// A folded frame has no size, and browsers load it all the same: its figure would be drawn into nothing.
for (const part of document.querySelectorAll("details.more"))
  part.addEventListener("toggle", () => {
    for (const frame of part.querySelectorAll("iframe[data-src]")) {
      frame.src = frame.dataset.src;
      frame.removeAttribute("data-src");
    }
  });
// A figure whose panels are stacked on a narrow screen tells its height; files have no common origin.
window.addEventListener("message", event => {
  const height = event.data && event.data.reclibHeight;
  if (Number.isFinite(height) && height > 0 && height < 10000)
    for (const frame of document.querySelectorAll("iframe"))
      if (frame.contentWindow === event.source) frame.height = Math.ceil(height);
});
