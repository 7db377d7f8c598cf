//! `trace.json`: both timelines in the Chrome trace format, which Perfetto and `chrome://tracing`
//! open. A process a rank; tracks for its actions and for its transfers, as many as overlap.
//! (Trace Event Format, by the Chromium authors; times in microseconds.)

use hgct_core::schedule::Action;
use hgct_core::timeline::{RankTimeline, Timeline, TimelineSource};
use serde_json::{Value, json};

/// Process ids of predicted ranks begin here.
const PREDICTED: u64 = 100_000;
/// First track of transfers.
const COMMUNICATION: u64 = 1000;

/// The trace; `None` without a timeline. Both timelines begin at 0.
pub(super) fn chrome(measured: Option<&Timeline>, predicted: Option<&Timeline>) -> Option<String> {
    let mut events = Vec::new();
    for timeline in [measured, predicted].into_iter().flatten() {
        if let Some((begin, _)) = timeline.span_ns() {
            for rank in &timeline.ranks {
                Process::new(timeline, rank, begin).write(rank, &mut events);
            }
        }
    }
    // One event a line: readable in a diff, and no larger.
    let lines: Vec<String> = events.iter().map(Value::to_string).collect();
    (!lines.is_empty())
        .then(|| format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n", lines.join(",\n")))
}

struct Process {
    pid: u64,
    name: String,
    begin: u64,
}

impl Process {
    fn new(timeline: &Timeline, rank: &RankTimeline, begin: u64) -> Self {
        let (base, source) = match timeline.source {
            TimelineSource::Measured => (0, "measured"),
            TimelineSource::Predicted => (PREDICTED, "predicted"),
        };
        Self {
            pid: base + u64::from(rank.rank.0) + 1,
            name: format!("{source} {}: {}", rank.rank, rank.device),
            begin,
        }
    }

    fn write(&self, rank: &RankTimeline, events: &mut Vec<Value>) {
        let uncertainty = json!({"clock_offset_ns": rank.clock_offset_ns, "clock_uncertainty_ns": rank.clock_uncertainty_ns});
        events.push(self.meta("process_name", None, json!({"name": self.name})));
        events.push(self.meta("process_sort_index", None, json!({"sort_index": self.pid})));
        events.push(self.meta("process_labels", None, json!({"labels": uncertainty.to_string()})));

        let mut actions = rank.actions.clone();
        actions.sort_by_key(|span| (span.start_ns, std::cmp::Reverse(span.end_ns)));
        let mut lanes = Lanes::default();
        let mut step = None;
        for span in &actions {
            if step != Some(span.step) {
                step = Some(span.step);
                events.push(self.instant(
                    &format!("step {}", span.step),
                    1,
                    "p",
                    span.start_ns,
                    &json!({"step": span.step}),
                ));
            }
            let args =
                json!({"step": span.step, "action": span.action, "micro_batch": span.action.micro_batch});
            let category = category(span.action);
            if span.end_ns <= span.start_ns {
                events.push(self.instant(&span.action.to_string(), 1, "t", span.start_ns, &args));
                continue;
            }
            let lane = 1 + lanes.take(span.start_ns, span.end_ns);
            events.push(self.complete(
                &span.action.to_string(),
                category,
                lane,
                (span.start_ns, span.end_ns),
                &args,
            ));
        }
        for lane in 0..lanes.count().max(1) {
            events.push(self.meta("thread_name", Some(1 + lane), json!({"name": track("compute", lane)})));
            events.push(self.meta("thread_sort_index", Some(1 + lane), json!({"sort_index": 1 + lane})));
        }

        let mut transfers = rank.transfers.clone();
        transfers.sort_by_key(|span| (span.start_ns, std::cmp::Reverse(span.end_ns)));
        let mut lanes = Lanes::default();
        for span in &transfers {
            let (word, way) = if span.outgoing { ("to", "send") } else { ("from", "receive") };
            let name = format!("{way} {word} {}", span.peer);
            let args = json!({"step": span.step, "peer": span.peer, "size_bytes": span.size_bytes});
            if span.end_ns <= span.start_ns {
                events.push(self.instant(&name, COMMUNICATION, "t", span.start_ns, &args));
                continue;
            }
            let lane = COMMUNICATION + lanes.take(span.start_ns, span.end_ns);
            events.push(self.complete(&name, "communication", lane, (span.start_ns, span.end_ns), &args));
        }
        for lane in 0..lanes.count().max(1) {
            let tid = COMMUNICATION + lane;
            events.push(self.meta("thread_name", Some(tid), json!({"name": track("communication", lane)})));
            events.push(self.meta("thread_sort_index", Some(tid), json!({"sort_index": tid})));
        }
    }

    fn meta(&self, name: &str, tid: Option<u64>, args: Value) -> Value {
        let mut event = json!({"ph": "M", "name": name, "pid": self.pid});
        if let Some(tid) = tid {
            event["tid"] = tid.into();
        }
        event["args"] = args;
        event
    }

    fn complete(
        &self,
        name: &str,
        category: &str,
        tid: u64,
        (start, end): (u64, u64),
        args: &Value,
    ) -> Value {
        json!({"ph": "X", "name": name, "cat": category, "pid": self.pid, "tid": tid, "ts": self.micros(start),
            "dur": (end - start) as f64 / 1e3, "args": args})
    }

    fn instant(&self, name: &str, tid: u64, scope: &str, at: u64, args: &Value) -> Value {
        json!({"ph": "i", "name": name, "pid": self.pid, "tid": tid, "s": scope, "ts": self.micros(at), "args": args})
    }

    /// Since the timeline's begin; a transfer may have begun before the first action.
    fn micros(&self, ns: u64) -> f64 {
        (i128::from(ns) - i128::from(self.begin)) as f64 / 1e3
    }
}

/// Puts spans that overlap on tracks of their own: complete events of one track must not.
#[derive(Debug, Default)]
struct Lanes {
    ends: Vec<u64>,
}

impl Lanes {
    fn take(&mut self, start: u64, end: u64) -> u64 {
        let free = self.ends.iter().position(|last| *last <= start);
        let lane = free.unwrap_or(self.ends.len());
        if lane == self.ends.len() {
            self.ends.push(end);
        }
        self.ends[lane] = end;
        lane as u64
    }

    fn count(&self) -> u64 {
        self.ends.len() as u64
    }
}

fn track(name: &str, lane: u64) -> String {
    if lane == 0 { name.into() } else { format!("{name} {}", lane + 1) }
}

fn category(action: Action) -> &'static str {
    if action.operation.is_compute() {
        "compute"
    } else if action.operation.has_micro_batch() {
        "send-receive"
    } else {
        "exchange"
    }
}
