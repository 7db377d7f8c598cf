//! What of a gradient exchange hides behind compute: the one rule of price and simulator.
//!
//! * A layer's gradient travels as soon as the last pass that adds to it is done on every holder: the
//!   backward of the last micro-batch or, where the schedule divides backwards, its weights' half, since
//!   the halves of all micro-batches add to the same sums and the last comes at the end.
//! * A pass goes from a stage's last layer to its first. So a layer's exchange runs beside the pass of
//!   the layers before it, and that of the first layer beside nothing.
//! * A device has one exchange at a time, last layers first.
//!
//! This is what PyTorch's data parallelism does with its buckets (Li et al. 2020, arXiv 2006.15704,
//! section 3.2.3), a bucket being a layer. The layers of a group share its seconds by their bytes.
//! Parameters that come back with sharded optimizer state are counted with their gradients; frameworks
//! hide them behind the first forward of the next step.
//!
//! The simulator knows when each holder ends, and hides more where some end before others. The price has
//! all of them end with the slowest pipeline, and leaves out what an interleaved stage waits between its
//! passes: of a stage's exchange it hides no more than one pass, which is part of a backward. That is
//! what the bound hides of each stage whole ([`crate::wide::Bound`]), so it hides no less.
//! Not priced is that a stage waits for holders which still exchange other layers, where pipelines are cut
//! in other places.

use std::ops::Range;

use super::Pricer;
use crate::instance::{Instance, Layout, Schedule, Stage, Template, Work};

/// Exchange layer by layer.
pub(crate) struct Buckets {
    /// Seconds of each layer's exchange.
    pub(crate) seconds: Vec<f64>,
    /// By template, stage and layer of the stage: the part of a pass that is left when it is by the layer.
    pub(crate) left: Vec<Vec<Vec<f64>>>,
}

impl Buckets {
    pub(crate) fn new(instance: &Instance, layout: &Layout) -> Self {
        let pricer = Pricer::new(instance, layout);
        Self::of_groups(&pricer, &pricer.exchange_groups())
    }

    /// `groups`: of all layers, those with the same holders together, with the seconds of their exchange.
    pub(super) fn of_groups(pricer: &Pricer<'_>, groups: &[(Range<u32>, f64)]) -> Self {
        let bytes = |layer: u32| pricer.instance.classes[pricer.classes[layer as usize]].gradient_bytes;
        let mut seconds = Vec::with_capacity(pricer.classes.len());
        for (layers, of_group) in groups {
            let all: f64 = layers.clone().map(bytes).sum();
            seconds.extend(
                layers.clone().map(|layer| if all > 0.0 { of_group * bytes(layer) / all } else { 0.0 }),
            );
        }
        let of_template = |t: &Template| t.stages.iter().map(|stage| left(pricer, t, stage)).collect();
        Self { seconds, left: pricer.layout.templates.iter().map(of_template).collect() }
    }

    /// Seconds by which the exchange of a stage, `exchange_s` in all, outlasts a last pass that hides
    /// `hides_s` at most.
    pub(super) fn exposed_s(
        &self,
        (template, stage): (usize, usize),
        layers: Range<u32>,
        exchange_s: f64,
        hides_s: f64,
    ) -> f64 {
        let seconds = &self.seconds[layers.start as usize..layers.end as usize];
        // Some layer begins as soon as it is ready, and those before it follow without a gap.
        let (mut remaining_s, mut exposed_s) = (exchange_s, 0.0f64);
        for (own_s, left) in seconds.iter().zip(&self.left[template][stage]).rev() {
            exposed_s = exposed_s.max(remaining_s - hides_s * left);
            remaining_s -= own_s;
        }
        exposed_s
    }
}

/// [`Buckets::left`] of a stage; nothing is left where costs are not known.
fn left(pricer: &Pricer<'_>, template: &Template, stage: &Stage) -> Vec<f64> {
    let Some(cost) = pricer.cost(template, stage) else { return vec![0.0; stage.num_layers() as usize] };
    let again = stage.recompute && !template.schedule.divides();
    let of_layer = |layer: u32| {
        let class = pricer.classes[layer as usize];
        cost.backward_s[class] + if again { cost.forward_s[class] } else { 0.0 }
    };
    let layers = stage.first_layer..stage.end_layer;
    let whole: f64 = layers.clone().map(of_layer).sum();
    let mut before = 0.0;
    let part = |layer| {
        let left = if whole > 0.0 { before / whole } else { 0.0 };
        before += of_layer(layer);
        left
    };
    layers.map(part).collect()
}

impl Schedule {
    /// Whether backwards come in halves.
    pub(crate) fn divides(self) -> bool {
        self == Self::ZeroBubble
    }

    /// Seconds of the pass that completes gradients.
    pub(super) fn last_pass_s(self, work: Work) -> f64 {
        if self.divides() { work.weights_s() } else { work.backward_s }
    }
}
