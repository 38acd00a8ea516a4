() => {
  // Gradio has a paste button but no Ctrl+V, and silently drops files whose type the browser does not know to be an image
  // (.tif, .ppm, a broken one): both are handed to the picture of the open tab as images, so that the server can judge them.
  const give = (file, target) => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([file], file.name, {type: file.type.startsWith('image/') ? file.type : 'image/x-any'}));
    target.dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true, cancelable: true}));
  };
  document.addEventListener('paste', event => {
    const file = event.clipboardData?.files?.[0];
    const target = [...document.querySelectorAll('.sc-query .upload-container')].find(element => element.offsetParent);
    if (file && target) give(file, target);
  });
  for (const kind of ['drop', 'change']) document.addEventListener(kind, event => {
    const file = (event.dataTransfer ?? event.target).files?.[0];
    const target = event.target.closest?.('.sc-query .upload-container');
    if (!file || !target || file.type.startsWith('image/')) return;
    event.preventDefault();
    event.stopPropagation();
    give(file, target);
  }, true);
}
