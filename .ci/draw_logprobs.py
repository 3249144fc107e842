"""Draw log probabilities as README's picture.

usage: python .ci/draw_logprobs.py http://localhost:8000 > .github/logprobs.svg
"""

import html
import sys

from vllm_provider import TokenLogprob, VLLMClient

PROMPTS = (
    "The capital of France is Rome.",
    "Hello! How can I help you?",
    "A small model could count: 1 2 3 5",
)
STYLE = """
text { font: 16px monospace; fill: #1f2328 } .small { font-size: 12px; fill: #59636e }
rect { fill: hsl(var(--hue), 75%, 82%) }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 } rect { fill: hsl(var(--hue), 75%, 27%) }
}
"""
WIDTH = 830


def write(x: float, y: float, text: str, size: int = 16) -> str:
    """Return an SVG text that is 0.6 em a character wide, whatever the font."""
    text = html.escape(text.replace(" ", "\N{NO-BREAK SPACE}"))
    length = 0.6 * size * len(html.unescape(text))
    style = "" if size == 16 else ' class="small"'
    return f'<text x="{x:.0f}" y="{y}" textLength="{length:.0f}"{style}>{text}</text>'


def notes(token: TokenLogprob) -> list[str]:
    """Return the token's probability, and the most likely token where that is another."""
    if token.probability is None:
        return []
    own = f"{token.probability:.2f}"
    if token.probability < 0.01:
        own = f"{token.probability:.2g}"

    best = token.top[0]
    if best.token == token.token:
        return [own]
    return [own, f"{best.token.strip()} {best.probability:.2f}"]


shapes, y = [], 0
with VLLMClient(sys.argv[1]) as client:
    for prompt in PROMPTS:
        reply = client.complete(prompt, echo=True, max_tokens=7, temperature=0, logprobs=2)
        x, y = 8.0, y + 22
        shapes.append(write(x, y, f'client.complete("{prompt}", echo=True, logprobs=2)', size=12))
        y += 12
        for token in reply.logprobs:
            widths = [9.6 * len(token.token), *(7.2 * len(note) for note in notes(token))]
            width = max(widths) + 8
            if x + width > WIDTH:
                x, y = 8.0, y + 66
            if token.probability is not None:
                place = f'x="{x:.0f}" y="{y}" width="{width - 3:.0f}" height="24" rx="3"'
                shapes.append(f'<rect {place} style="--hue:{120 * token.probability:.0f}"/>')
            shapes.append(write(x + 3, y + 17, token.token))
            for line, note in enumerate(notes(token)):
                shapes.append(write(x + 3, y + 38 + 14 * line, note, size=12))
            x += width
        y += 66

size = f'viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
print(f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>')
print("<title>Tokens coloured by their probability</title>", *shapes, "</svg>", sep="\n")
