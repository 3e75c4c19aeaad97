// Post the form without leaving the page, so that its stream stays open.
const form = document.querySelector("#publish");

form.addEventListener("submit", (event) => {
  event.preventDefault();
  fetch(form.action, { method: "POST", body: new FormData(form) });
  form.reset();
});
