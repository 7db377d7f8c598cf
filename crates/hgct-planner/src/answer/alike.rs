//! Neighbouring stages that are alike, so that people read one row for all of them.

use std::ops::Range;

use crate::instance::{Instance, Stage};

/// Runs of neighbouring stages that hold the same kinds of layers on alike devices.
pub(super) fn alike(instance: &Instance, stages: &[Stage]) -> Vec<Range<usize>> {
    let classes = instance.layer_classes();
    let layers = |stage: &Stage| &classes[stage.first_layer as usize..stage.end_layer as usize];
    let same = |a: &Stage, b: &Stage| {
        let place = Stage { first_layer: a.first_layer, end_layer: a.end_layer, ..b.clone() };
        place == *a && layers(a) == layers(b)
    };
    let mut at = 0;
    let run = |run: &[Stage]| {
        at += run.len();
        at - run.len()..at
    };
    stages.chunk_by(same).map(run).collect()
}

/// The layers of a run of stages: `12`, `5–8`, or `5–40, 4 each`.
pub(super) fn layers_of(run: &[Stage]) -> String {
    let [first, .., last] = run else {
        return run.first().map_or_else(String::new, |s| crate::words::layers(s.first_layer, s.end_layer));
    };
    let whole = crate::words::layers(first.first_layer, last.end_layer);
    format!("{whole}, {} each", first.num_layers())
}
