const { connect } = await import(document.querySelector("#eventsource").src);

const list = document.querySelector("#news");
const state = document.querySelector("#state");

const stream = connect(list.dataset.url, {
  share: true,
  renew: list.dataset.renew,
  onState: (name, status) => {
    state.textContent = status === 401 ? "refused: log in again" : name;
  },
});

stream.addEventListener("ping", (event) => {
  const item = document.createElement("li");
  item.textContent = event.data;
  list.append(item);
});
stream.addEventListener("reset", () => location.reload());
