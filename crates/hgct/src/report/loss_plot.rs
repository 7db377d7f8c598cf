//! `loss.svg`: training and held-out loss over steps, with what simpler models reach.

use std::fmt::Write as _;

use super::summary::DataSummary;
use super::svg::{line, number, picture, text, ticks};
use crate::metrics::Metrics;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 44.0;
/// Most points of a line; more could not be told apart.
const MAX_POINTS: usize = 400;

/// The picture; `None` without losses.
pub(super) fn draw(metrics: &Metrics, data: &DataSummary) -> Option<String> {
    // A loss after `step` updates stands at `step`; that of step 0 comes before any.
    let train: Vec<(f64, f64)> = metrics
        .steps
        .iter()
        .filter(|row| row.loss.is_finite())
        .map(|row| (row.step as f64, row.loss))
        .collect();
    let held_out: Vec<(f64, f64)> = metrics
        .evaluations
        .iter()
        .filter(|row| row.loss.is_finite())
        .map(|row| (row.step as f64, row.loss))
        .collect();
    let points = || train.iter().chain(&held_out);
    points().next()?;
    let bases: Vec<(&str, f64)> = [("bigram", data.bigram_nats), ("unigram", data.unigram_nats)]
        .into_iter()
        .filter_map(|(name, loss)| Some((name, loss.filter(|loss| loss.is_finite())?)))
        .collect();
    let losses = || points().map(|(_, loss)| *loss).chain(bases.iter().map(|(_, loss)| *loss));
    let (low, high) = (losses().fold(f64::INFINITY, f64::min), losses().fold(f64::NEG_INFINITY, f64::max));
    let margin = ((high - low) * 0.06).max(0.05);
    let scale = Scale {
        steps: points().map(|(step, _)| *step).fold(1.0, f64::max),
        low: (low - margin).max(0.0),
        high: high + margin,
    };
    let mut body = String::new();
    axes(&mut body, &scale);
    let mut labels = Vec::new();
    for (name, loss) in &bases {
        line(&mut body, "line s3 dash", (LEFT, scale.y(*loss)), (WIDTH - RIGHT, scale.y(*loss)));
        labels.push((scale.y(*loss), "f3", format!("{name} {loss:.2}")));
    }
    let drawn = thinned(&train);
    path(&mut body, "line s1", 1.6, &drawn, &scale);
    if let Some((_, loss)) = drawn.last() {
        labels.push((scale.y(*loss), "f1", format!("training {loss:.2}")));
    }
    path(&mut body, "line s2", 2.0, &held_out, &scale);
    for (step, loss) in &held_out {
        let (x, y) = (number(scale.x(*step)), number(scale.y(*loss)));
        let _ = writeln!(body, "<circle class=\"f2\" cx=\"{x}\" cy=\"{y}\" r=\"3\"/>");
    }
    if let Some((_, loss)) = held_out.last() {
        labels.push((scale.y(*loss), "f2", format!("held-out {loss:.2}")));
    }
    for (y, class, label) in spread(labels) {
        text(&mut body, WIDTH - RIGHT + 10.0, y + 4.0, "start", class, &label);
    }
    let mut description = Vec::new();
    if let (Some(first), Some(last)) = (train.first(), train.last()) {
        description.push(format!(
            "Training loss from {:.2} to {:.2} over {} steps.",
            first.1,
            last.1,
            train.len()
        ));
    }
    if let Some((step, loss)) = held_out.last() {
        description.push(format!("Held-out loss {loss:.2} after {step} steps."));
    }
    description.extend(bases.iter().map(|(name, loss)| format!("A {name} model reaches {loss:.2}.")));
    Some(picture(WIDTH, HEIGHT, "Loss over steps", &description.join(" "), &body))
}

struct Scale {
    steps: f64,
    low: f64,
    high: f64,
}

impl Scale {
    fn x(&self, step: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * step / self.steps
    }

    fn y(&self, loss: f64) -> f64 {
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (loss - self.low) / (self.high - self.low)
    }
}

fn axes(body: &mut String, scale: &Scale) {
    text(body, LEFT, 24.0, "start", "strong", "Loss, nats a token");
    for tick in ticks(scale.low, scale.high, 6.0) {
        line(body, "grid", (LEFT, scale.y(tick)), (WIDTH - RIGHT, scale.y(tick)));
        // As many digits as tell neighbours apart.
        let label = if scale.high - scale.low < 2.0 { format!("{tick:.2}") } else { format!("{tick:.1}") };
        text(body, LEFT - 8.0, scale.y(tick) + 4.0, "end", "soft", &label);
    }
    line(body, "axis", (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM));
    for tick in ticks(0.0, scale.steps, 6.0).into_iter().filter(|tick| tick.fract() == 0.0) {
        text(body, scale.x(tick), HEIGHT - BOTTOM + 18.0, "middle", "soft", &format!("{tick}"));
    }
    text(body, f64::midpoint(LEFT, WIDTH - RIGHT), HEIGHT - 8.0, "middle", "soft", "step");
}

fn path(body: &mut String, class: &str, width: f64, points: &[(f64, f64)], scale: &Scale) {
    if points.len() < 2 {
        return;
    }
    let mut d = String::new();
    for (index, (step, loss)) in points.iter().enumerate() {
        let _ = write!(
            d,
            "{}{} {}",
            if index == 0 { 'M' } else { 'L' },
            number(scale.x(*step)),
            number(scale.y(*loss))
        );
    }
    let _ = writeln!(body, "<path class=\"{class}\" stroke-width=\"{width}\" d=\"{d}\"/>");
}

/// At most [`MAX_POINTS`] points, each the mean of its neighbours.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |part: &[(f64, f64)]| {
        let n = part.len() as f64;
        (part.iter().map(|p| p.0).sum::<f64>() / n, part.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(points.len().div_ceil(MAX_POINTS).max(1)).map(mean).collect()
}

/// Moves labels apart that would lie on each other.
fn spread(mut labels: Vec<(f64, &'static str, String)>) -> Vec<(f64, &'static str, String)> {
    const APART: f64 = 15.0;
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    for index in 1..labels.len() {
        labels[index].0 = labels[index].0.max(labels[index - 1].0 + APART);
    }
    let mut lowest = HEIGHT - BOTTOM;
    for label in labels.iter_mut().rev() {
        label.0 = label.0.min(lowest);
        lowest = label.0 - APART;
    }
    labels
}
