// Before anything is painted: the theme that was chosen here last, if any.
try {
  const chosen = localStorage.getItem("latentrt.theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
} catch { /* a browser that keeps nothing has the system's theme */ }
