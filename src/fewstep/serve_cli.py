"""fewstep serve: a local page to look at few-step generators with."""

import html
import ipaddress
import itertools
import math
import os
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from fewstep.serve import Studio

# nothing from elsewhere, whatever Gradio asks for
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
CSS = """
#log-sigma :is(.head, .min_value, .max_value) { display: none }
#picture img { object-fit: contain; max-height: 80vh }
@media (max-width: 700px) { #drawing { order: -1 } }
"""


def serve(
    *models: tyro.conf.Positional[str], port: int = 7860, host: str = "127.0.0.1", device: str = "auto",
    open: bool = False, num: int = 16,
) -> None:  # fmt: skip
    """A local page to look at models: weights side by side on the same noise, steps, sigmas, classes. Ctrl-C ends it.

    Args:
        models: Run directories, folders of `fewstep combine`, snapshot files; of a directory all its weights can be chosen.
        port: Of the page's address.
        host: The address to listen at; the default lets only this machine in.
        device: auto, cpu, cuda, cuda:1 or mps.
        open: Open the page in a browser.
        num: Images at first, 1 to 64.
    """
    from fewstep.console import say
    from fewstep.environment import pick_device
    from fewstep.interrupts import Interrupted
    from fewstep.serve import MOST, Studio
    from fewstep.types import FewstepError

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(number, "the page is closed")

    if not models:
        raise FewstepError("give at least one model: fewstep serve RUN...")
    if not 1 <= num <= MOST:
        raise FewstepError(f"--num must be 1 to {MOST}, got {num}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with serving(Studio(models, pick_device(device)), host, port, num) as url:
        if not loopback(host):
            say(f"warning: --host {host} lets everyone on the network use this page; it asks for no password")
        say(f"{url} (Ctrl-C ends it)")
        if open:
            webbrowser.open(url)
        threading.Event().wait()


@contextmanager
def serving(studio: "Studio", host: str, port: int, num: int = 16) -> Iterator[str]:
    """The page at its address, while inside."""
    gradio = import_gradio()
    check_free(host, port)
    proxyless = [os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")), host, "localhost"]
    with tempfile.TemporaryDirectory(prefix="fewstep-serve-") as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, no_proxy=",".join(filter(None, proxyless)))  # Gradio calls itself
        blocks = page(studio, Path(folder) / "drawings", num)
        theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        try:
            _, url, _ = blocks.launch(
                server_name=host, server_port=port, theme=theme, css=CSS, quiet=True, share=False, inbrowser=False,
                prevent_thread_lock=True, show_error=True, ssr_mode=False, run_history=False,
                enable_monitoring=False, mcp_server=False, footer_links=[], app_kwargs={"middleware": [(Offline, (), {})]},
            )  # fmt: skip
            yield url
        finally:
            blocks.close(verbose=False)


def import_gradio() -> Any:
    """Gradio, told to keep to itself; FewstepError if it is missing."""
    from fewstep.types import FewstepError

    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    try:
        import gradio
    except ImportError:
        raise FewstepError("the page needs Gradio: pip install 'fewstep[serve]'") from None
    return gradio


def page(studio: "Studio", folder: Path, num: int) -> Any:
    """The page as Gradio's Blocks, with a first picture; folder: for the files of the latest ones."""
    from fewstep.serve import HIGHEST, LOWEST, MOST, SOLVER_DEFAULT, SOLVER_STEPS, STEPS, controls

    gr, first = import_gradio(), studio.weights()[0]
    state, show = controls(studio, first, "", "each", 1, None), drawn(studio, folder)
    picture, told, code, *files = show(first, "", 0, state["label"]["value"], 1, SOLVER_DEFAULT, 1.0, num)
    low, high = math.log10(LOWEST), math.log10(HIGHEST)
    with gr.Blocks(title="fewstep", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("### fewstep: what these weights make of noise, alone or beside others")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                weights = gr.Dropdown(studio.weights(), value=first, label="Weights")
                compare = gr.Dropdown(
                    [("nothing", ""), *studio.weights()], **state["compare"], label="Beside them, from the same noise"
                )
                label = gr.Dropdown(**state["label"], label="Class", allow_custom_value=True)
                steps = gr.Slider(1, STEPS, 1, step=1, **state["steps"], label="Consistency steps")
                sigma = gr.Number(**state["sigma"], label="σ of the second (the last) step")
                log_sigma = gr.Slider(low, high, step=0.01, **state["log_sigma"], buttons=[], elem_id="log-sigma")
                solver = gr.Slider(1, SOLVER_STEPS, SOLVER_DEFAULT, step=1, **state["solver_steps"], label="Heun steps")
                count = gr.Slider(1, MOST, num, step=1, label="Images")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                new = gr.Button("New seed")
            with gr.Column(scale=3, min_width=300, elem_id="drawing"):
                image = gr.Image(
                    picture, show_label=False, interactive=False, buttons=["fullscreen"], elem_id="picture"
                )
                text = gr.Markdown(told)
                with gr.Row():
                    kinds = zip(("PNG", "JSON"), files, strict=True)
                    downloads = [gr.DownloadButton(f"Download {kind}", file) for kind, file in kinds]
                with gr.Accordion("The same images in Python", open=False):
                    program = gr.Code(code, language="python", show_label=False)
        outputs = [image, text, program, *downloads]
        wire(studio, show, [weights, compare, seed, label, steps, solver, sigma, count], outputs, log_sigma, new)
    return blocks


def wire(studio: "Studio", show: Any, inputs: list[Any], outputs: list[Any], log_sigma: Any, new: Any) -> None:
    """What happens when a control is moved: the others follow, and a picture is drawn."""
    from fewstep.serve import controls

    gr = import_gradio()
    weights, compare, seed, label, steps, solver, sigma, count = inputs

    def follow(*values: Any) -> Any:
        return [gr.update(**change) for change in controls(studio, *values).values()]

    drawing = {
        "fn": show, "inputs": inputs, "outputs": outputs, "show_progress_on": outputs[0], "trigger_mode": "always_last",
    }  # fmt: skip
    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    followers = [compare, label, steps, solver, sigma, log_sigma]
    changes = [
        # new weights bring their own sigma
        weights.input(follow, [weights, compare, label, steps, gr.State()], followers, **quiet),
        compare.input(follow, [weights, compare, label, steps, sigma], followers, **quiet),
        steps.input(follow, [weights, compare, label, steps, sigma], followers, **quiet),
        log_sigma.input(None, log_sigma, sigma, js="p => Number((10 ** p).toPrecision(3))", **quiet),
        sigma.input(None, sigma, log_sigma, js="s => Math.log10(Math.min(Math.max(s, 0.05), 20))", **quiet),
        new.click(None, None, seed, js="() => Math.floor(1e6 * Math.random())", **quiet),
    ]
    gr.on([seed.input, label.input, solver.input, count.input], **drawing, api_name="draw")
    for change in changes:
        change.then(**drawing, api_visibility="private")


def drawn(studio: "Studio", folder: Path) -> Any:
    """The page's function: the values of its controls -> the picture, what it took, its program, its files."""
    from fewstep.serve import Request, details, saved
    from fewstep.types import FewstepError

    gr, slots = import_gradio(), itertools.count()

    def show(
        weights: str, compare: str, seed: int | None, label: str, steps: int, solver_steps: int, sigma: float | None,
        num: int, progress: Any = gr.Progress(),
    ) -> Any:  # fmt: skip
        if seed is None or sigma is None:  # being typed
            return gr.skip()
        try:
            request = Request(
                weights=weights, compare=compare or "", seed=int(seed), label=label or "", steps=int(steps),
                solver_steps=int(solver_steps), second_sigma=float(sigma), num=int(num),
            )  # fmt: skip
            drawing = studio.draw(request, lambda done, total: progress((done, total), unit="evaluations"))
        except FewstepError as error:
            raise gr.Error(html.escape(str(error)), title="fewstep", print_exception=False) from None
        files = saved(drawing, folder / str(next(slots) % 16))
        return files[0], details(drawing.told), "\n".join(one["python"] for one in drawing.told["panels"]), *files

    return show


class Offline:
    """ASGI: tells the browser to load nothing from anywhere else."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def stamped(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, stamped)


def check_free(host: str, port: int) -> None:
    """FewstepError unless one can listen there."""
    from fewstep.types import FewstepError

    if not 0 < port < 65536:
        raise FewstepError(f"--port must be 1 to 65535, got {port}")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        reason = (error.strerror or "no such address").partition(" (")[0]
        raise FewstepError(
            f"cannot listen at {host}:{port} ({reason}): give another port, e.g. --port {port % 65535 + 1}, or --host"
        ) from None


def loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
