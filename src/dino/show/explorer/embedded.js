// The page as one file: its content lies in it.

start(JSON.parse(byId("content").textContent)).catch((error) => {
  byId("images").textContent = `This browser cannot show the page (${error.message}). `
    + "It needs one of 2023 or newer.";
});
