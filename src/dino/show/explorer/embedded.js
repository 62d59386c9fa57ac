// The page as one file: its content lies in it.

setUp();
fill(JSON.parse(byId("content").textContent)).then(
  () => { document.body.dataset.ready = "true"; },
  (error) => {
    byId("images").textContent = `This browser cannot show the page (${error.message}). `
      + "It needs one of 2023 or newer.";
  },
);
