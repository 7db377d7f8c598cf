//! `timeline.svg`: one step of every rank as it was predicted, and below it as it was measured.

use std::fmt::Write as _;

use hgct_core::schedule::Operation;
use hgct_core::timeline::{ActionSpan, RankTimeline, Timeline};

use super::facts::only_step;
use super::shares::awaited_until;
use super::steady_step;
use super::svg::{line, number, picture, rect, text, ticks};
use super::text::seconds;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 176.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 58.0;
const COMPUTE: f64 = 18.0;
const WIRE: f64 = 5.0;
const ROW: f64 = 38.0;
const PANEL: f64 = 26.0;
/// More ranks than this would make a wall, not a picture.
const MAX_RANKS: usize = 24;

/// The picture of predicted above measured; `None` without a timeline. `kinds` has a line below each
/// rank's device, in rank order.
pub(super) fn draw(
    predicted: Option<&Timeline>,
    measured: Option<&Timeline>,
    kinds: &[&str],
) -> Option<String> {
    let panel = |name: &str, timeline: Option<&Timeline>| {
        let timeline = timeline?;
        let (step, begin, end) = steady_step(timeline)?;
        let ranks = timeline.ranks.iter().take(MAX_RANKS).map(|rank| only_step(rank, step)).collect();
        let name = if name == "measured" { format!("measured (step {step})") } else { name.to_owned() };
        Some(Panel {
            name,
            begin,
            length: end - begin,
            ranks,
            hidden: timeline.ranks.len().saturating_sub(MAX_RANKS),
        })
    };
    let panels: Vec<Panel> =
        [panel("predicted", predicted), panel("measured", measured)].into_iter().flatten().collect();
    let longest = panels.iter().map(|panel| panel.length).max().filter(|longest| *longest > 0)?;
    let mut body = String::new();
    text(&mut body, 20.0, 26.0, "start", "strong", "One step");
    legend(&mut body);
    let heights: f64 = panels.iter().map(Panel::height).sum();
    let floor = TOP + heights;
    for tick in ticks(0.0, longest as f64 / 1e6, 8.0) {
        let at = x(tick * 1e6, longest);
        line(&mut body, "grid", (at, TOP), (at, floor));
        text(&mut body, at, floor + 16.0, "middle", "soft small", &number(tick));
    }
    text(&mut body, LEFT - 12.0, floor + 16.0, "end", "soft small", "milliseconds");
    let mut y = TOP;
    for panel in &panels {
        panel.draw(&mut body, y, longest, kinds);
        y += panel.height();
    }
    let told: Vec<String> = panels
        .iter()
        .map(|panel| format!("{}: {}", panel.name, seconds(panel.length as f64 / 1e9)))
        .collect();
    let description = format!(
        "For each rank its forward, backward and exchange actions, and below them its transfers. {}.",
        told.join("; ")
    );
    Some(picture(WIDTH, floor + 30.0, "Timeline of one step", &description, &body))
}

struct Panel {
    name: String,
    begin: u64,
    length: u64,
    ranks: Vec<RankTimeline>,
    hidden: usize,
}

impl Panel {
    fn height(&self) -> f64 {
        PANEL + ROW * self.ranks.len() as f64 + if self.hidden > 0 { 18.0 } else { 0.0 } + 8.0
    }

    fn draw(&self, body: &mut String, top: f64, longest: u64, kinds: &[&str]) {
        text(body, 20.0, top + 16.0, "start", "strong", &self.name);
        let length = self.length as f64;
        text(body, LEFT, top + 16.0, "start", "soft", &seconds(length / 1e9));
        let end = x(length, longest);
        for (index, rank) in self.ranks.iter().enumerate() {
            let y = top + PANEL + ROW * index as f64;
            let kind = kinds.get(rank.rank.index()).copied().unwrap_or_default();
            text(body, 20.0, y + 11.0, "start", "small", &shortened(rank.device.as_str()));
            text(body, 20.0, y + 24.0, "start", "small soft", &shortened(kind));
            rect(body, "lane", LEFT, y, end - LEFT, COMPUTE);
            rect(body, "lane", LEFT, y + COMPUTE + 3.0, end - LEFT, WIRE);
            for class in ["F", "B", "X"] {
                let of_class = |span: &&ActionSpan| class_of(span.action.operation) == Some(class);
                let spans = rank.actions.iter().filter(of_class).map(|span| (span.start_ns, span.end_ns));
                self.boxes(body, class, spans.collect(), (y, COMPUTE), longest, false);
            }
            let exchange = rank.actions.iter().filter(|span| class_of(span.action.operation) == Some("X"));
            let waits = exchange.map(|span| (span.start_ns, awaited_until(rank, span)));
            self.boxes(
                body,
                "Y",
                waits.filter(|(start, end)| start < end).collect(),
                (y, COMPUTE),
                longest,
                false,
            );
            let transfers = rank.transfers.iter().map(|span| (span.start_ns, span.end_ns)).collect();
            self.boxes(body, "T", transfers, (y + COMPUTE + 3.0, WIRE), longest, true);
        }
        if self.hidden > 0 {
            let y = top + PANEL + ROW * self.ranks.len() as f64 + 8.0;
            text(body, 20.0, y, "start", "small soft", &format!("and {} ranks more", self.hidden));
        }
    }

    /// All spans of a class as one path; what is too near to tell apart becomes one box.
    fn boxes(
        &self,
        body: &mut String,
        class: &str,
        mut spans: Vec<(u64, u64)>,
        (y, height): (f64, f64),
        longest: u64,
        joined: bool,
    ) {
        spans.sort_unstable();
        let at = |ns: u64| x(ns.saturating_sub(self.begin).min(self.length) as f64, longest);
        let mut drawn: Vec<(f64, f64)> = Vec::new();
        for (start, end) in spans {
            let (start, end) = (at(start), at(end));
            match drawn.last_mut() {
                Some(last) if start < last.1 + 0.3 && (joined || end - last.0 < 1.2) => {
                    last.1 = last.1.max(end);
                }
                _ => drawn.push((start, end)),
            }
        }
        let mut d = String::new();
        for (start, end) in drawn {
            // A hair between neighbours shows where one ends.
            let width = if joined || end - start < 2.0 { (end - start).max(0.4) } else { end - start - 0.5 };
            let (w, h) = (number(width), number(height));
            if w != "0" {
                let _ = write!(d, "M{} {}h{w}v{h}h-{w}z", number(start), number(y));
            }
        }
        if !d.is_empty() {
            let _ = writeln!(body, "<path class=\"{class}\" d=\"{d}\"/>");
        }
    }
}

fn x(ns: f64, longest: u64) -> f64 {
    LEFT + (WIDTH - LEFT - RIGHT) * ns / longest as f64
}

fn class_of(operation: Operation) -> Option<&'static str> {
    match operation {
        Operation::Forward => Some("F"),
        Operation::Backward | Operation::BackwardInput | Operation::BackwardWeight => Some("B"),
        Operation::Reduce | Operation::Update | Operation::Gather => Some("X"),
        _ => None,
    }
}

fn legend(body: &mut String) {
    let mut at = LEFT;
    for (class, name, width) in [
        ("F", "forward", 66.0),
        ("B", "backward", 76.0),
        ("X", "reduce, update, gather", 154.0),
        ("Y", "waiting in these", 110.0),
        ("T", "transfer", 66.0),
        ("lane", "waiting", 70.0),
    ] {
        rect(body, class, at, 16.0, 12.0, 12.0);
        text(body, at + 18.0, 26.0, "start", "soft", name);
        at += width + 12.0;
    }
}

/// At most so many characters as the column of names holds.
fn shortened(name: &str) -> String {
    const MOST: usize = 24;
    if name.chars().count() <= MOST {
        return name.into();
    }
    name.chars().take(MOST - 1).chain(['…']).collect()
}
