//! The cheapest last stages of pipelines.

/// The last stages of a pipeline, by their first one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Suffix {
    pub(super) price: f64,
    /// Layer past the stage.
    pub(super) end: usize,
    pub(super) way: usize,
    /// Level of the stages behind it.
    pub(super) level: usize,
    /// Stages at least, with the first.
    pub(super) stages: usize,
}

/// The cheapest suffixes, by number of stages and by first layer.
pub(super) struct Suffixes {
    width: usize,
    best: Vec<Suffix>,
}

impl Suffixes {
    pub(super) fn new(layers: usize, levels: usize) -> Self {
        let none = Suffix { price: f64::INFINITY, end: layers, way: 0, level: 0, stages: usize::MAX };
        let mut best = vec![none; (levels + 1) * (layers + 1)];
        best[layers] = Suffix { price: 0.0, stages: 0, ..none };
        Self { width: layers + 1, best }
    }

    pub(super) fn at(&self, level: usize, first: usize) -> Suffix {
        self.best[level * self.width + first]
    }

    /// Takes what is cheaper, and the fewest stages of any.
    pub(super) fn offer(&mut self, level: usize, first: usize, new: Suffix) {
        let best = &mut self.best[level * self.width + first];
        let stages = best.stages.min(new.stages);
        if new.price < best.price {
            *best = new;
        }
        best.stages = stages;
    }
}
