"""How often is the check without a model right? Hand-written correct answers to the sample rows, rendered, asked.

    python benchmarks/structeval_offline.py SAMPLE.json --json out.json

Each question is asked with its given answer (the picture shows it: "true" is right) and with the answer of each other
question of its row (mostly not shown: "true" is counted as a false alarm; a shared answer is left out).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trimtab.structeval import generations, offline, tasks
from trimtab.structeval.aggregate import share
from trimtab.structeval.drawing import Drawing
from trimtab.structeval.table import estimate_text
from trimtab.structeval.tasks import Question

ANSWERS = {
    "000100": """
import { Component } from '@angular/core';
@Component({ selector: 'app-root', standalone: true, template: `
<div class="report-wrapper"><h1>User Report Dashboard</h1>
<section><table><tr><th>Name</th><th>Logins</th><th>Errors</th></tr>
<tr><td>Ada</td><td>12</td><td class="status-critical">7</td></tr></table></section>
<section><p style="color: green; font-style: italic">Ada signed in at 9.</p></section>
<div class="button-area"><button>Update Report</button></div></div>`,
styles: [`h1 { text-align: center } .status-critical { font-weight: bold }`] })
export class AppComponent {}
""",
    "001144": """
export default function App() {
  const [name, setName] = React.useState("");
  return (<div style={{display: "flex", flexDirection: "column", gap: 8}}>
    <h1 style={{textAlign: "center"}}>Restaurant Order Form</h1>
    <input placeholder="Enter your name" value={name} onChange={e => setName(e.target.value)} />
    <select><option>Indoor</option><option>Outdoor</option><option>Bar</option></select>
    <label><input type="radio" name="meal" />Lunch</label><label><input type="radio" name="meal" />Dinner</label>
    <input type="number" min="1" defaultValue="1" />
    <button style={{background: "green"}}>Place Order</button><button>Clear Form</button><p></p>
  </div>);
}
""",
    "001146": """
export default function App() {
  return (<form style={{display: "flex", flexDirection: "column", alignItems: "center"}}>
    <h1>Subscribe Now</h1>
    <div><input placeholder="Enter your email address" /><label><input type="checkbox" />Receive Updates</label></div>
    <span></span><button style={{background: "green"}}>Sign Up</button><p></p>
  </form>);
}
""",
    "001236": """
<svg xmlns="http://www.w3.org/2000/svg" width="400" height="400"><defs><linearGradient id="f" x2="0" y2="1">
<stop stop-color="#FFFF00"/><stop offset="1" stop-color="#FF0000"/></linearGradient></defs>
<polygon points="190,330 210,330 200,400" fill="url(#f)"/><polygon points="180,330 195,330 185,390" fill="url(#f)"/>
<polygon points="205,330 220,330 215,390" fill="url(#f)"/><ellipse cx="200" cy="240" rx="40" ry="100" fill="#1E90FF"/>
<polygon points="160,170 240,170 200,90" fill="#FF4500"/>
<polygon points="160,340 170,340 150,400 120,400" fill="#32CD32"/>
<polygon points="240,340 230,340 250,400 280,400" fill="#32CD32"/>
<circle cx="200" cy="240" r="15" fill="#FFFFFF" stroke="#000000" stroke-width="2"/></svg>
""",
    "001424": """
= Course Syllabus
== Course Description
#lorem(20)
#line(length: 100%)
== Modules
=== Module One
+ First point
+ Second point
=== Module Two
+ First point
+ Second point
=== Module Three
+ First point
+ Second point
== Schedule
#table(columns: 3, [Week], [Topic], [Reading], [1], [Start], [Book])
#align(center)[#text(size: 8pt)[End of Syllabus]]
""",
    "001426": """
#align(center)[= Tech Summit 2024]
== Morning Sessions
Opening talk, 9:00.

Second talk, 10:00.
== Workshop Details
#table(columns: 3, [Workshop Title], [Lead Speaker], [Time],
  [Rust], [Ann], [11:00], [Go], [Bob], [12:00], [Zig], [Cy], [13:00])
== Breakout Tracks
=== Data
- Lakes
- Streams
=== Web
- Forms
- Pages
=== Security
- Keys
- Locks
#line(length: 100%)
#align(center)[==== _Location: City Convention Centre_]
""",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sample", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    found = [
        generations.Generated(task, f"<|BEGIN_CODE|>{ANSWERS[task.id]}<|END_CODE|>")
        for task in tasks.load(options.sample)
        if task.id in ANSWERS
    ]
    with Drawing(options.store, workers=2) as drawing:
        drawn = drawing.draw_all(found)
    right: list[bool] = []
    false: list[bool] = []
    asked = decided_wrong = 0
    for one in found:
        made = drawn[one.task.id]
        print(one.task.id, one.task.output_format, made.status, *made.errors[:1])
        if made.status != "rendered":
            continue
        for pair in one.task.questions:
            asked += 1
            answer = offline.decide(pair, made.text).answer
            if answer is not None:
                right.append(answer)
            others = {other.answer for other in one.task.questions} - {pair.answer}
            decisions = [offline.decide(Question(pair.question, other), made.text).answer for other in others]
            false += [decision is True for decision in decisions if decision is not None]
            decided_wrong += len(decisions)
    document = {
        "questions": asked,
        "decided": len(right),
        "agrees": share(right)._asdict(),
        "wrong_answers": decided_wrong,
        "wrong_decided": len(false),
        "wrong_called_true": share(false)._asdict(),
    }
    print(f"{asked} questions, {len(right)} decided, agreement {estimate_text(share(right))} %")
    print(f"{decided_wrong} wrong answers, {len(false)} decided, called true {estimate_text(share(false))} %")
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
