//! Stages inside a run of alike layers, which differ by their length alone: the cheapest way for each.

use std::ops::Range;

use super::super::table::Table;
use super::{Chains, Priced};

/// Layers from which on a run is worth a table of its own.
const MANY: usize = 8;

/// The cheapest stage of a length.
#[derive(Debug, Clone, Copy)]
pub(super) struct Length {
    /// With both of its ends; infinite where no way is as long.
    pub(super) price: f64,
    pub(super) way: usize,
}

/// The cheapest stages of each length in one run of layers.
pub(super) struct Lengths {
    layers: Range<usize>,
    /// Layers at most on each way, as its pace and its exchange allow.
    reach: Vec<usize>,
    /// The same of a stage with one neighbour, on any way.
    longest: usize,
    /// From one layer on, by stages behind: the more, the less memory is left. Made when asked for.
    cheapest: Vec<Vec<Length>>,
}

/// The runs of layers that are long enough.
pub(super) fn long_runs(table: &Table<'_>) -> Vec<Range<usize>> {
    let mut end = 0;
    let runs = table.instance.runs.iter().map(|run| {
        let first = end;
        end += run.count as usize;
        first..end
    });
    runs.filter(|run| run.len() >= MANY).collect()
}

/// Layers at most of a stage, up to `most`, where those that fit are all up to some number.
pub(super) fn longest(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, most + 1);
    while high - low > 1 {
        let middle = usize::midpoint(low, high);
        if fits(middle) { low = middle } else { high = middle }
    }
    low
}

impl Lengths {
    /// `allowed` says whether a way may have a stage of these layers with so many neighbours.
    pub(super) fn new(
        layers: Range<usize>,
        num_ways: usize,
        allowed: impl Fn(usize, Range<usize>, f64) -> bool,
    ) -> Self {
        let fits = |way: usize, num: usize, neighbours: f64| {
            num <= layers.len() && allowed(way, layers.start..layers.start + num, neighbours)
        };
        let reach = |way: usize| longest(layers.len(), |num| fits(way, num, 2.0));
        let reach: Vec<usize> = (0..num_ways).map(reach).collect();
        let mut longest = 0;
        for (way, reach) in reach.iter().enumerate() {
            longest = longest.max(*reach);
            while fits(way, longest + 1, 1.0) {
                longest += 1;
            }
        }
        Self { layers, reach, longest, cheapest: Vec::new() }
    }

    /// The run's first layer, if a stage that ends there may be inside.
    pub(super) fn first(&self, end: usize) -> Option<usize> {
        (self.layers.start < end && end <= self.layers.end).then_some(self.layers.start)
    }

    /// Whether a stage that ends at a layer inside may begin before the run.
    pub(super) fn crosses(&self, end: usize) -> bool {
        end - self.layers.start <= self.longest
    }

    /// The cheapest stages with so many behind them, from one layer on.
    pub(super) fn behind(&mut self, chains: &Chains<'_, '_>, ways: &[Priced], stages: usize) -> &[Length] {
        while self.cheapest.len() <= stages {
            let next = self.next(chains, ways);
            self.cheapest.push(next);
        }
        &self.cheapest[stages]
    }

    /// Those with one more stage behind than there are yet.
    fn next(&self, chains: &Chains<'_, '_>, ways: &[Priced]) -> Vec<Length> {
        let behind = self.cheapest.len();
        let Range { start, end } = self.layers;
        let room = |way: usize| end - chains.fitting(way, behind, end);
        let cheapest = |num: usize| {
            let of = |way: usize| {
                let of = &ways[way];
                let price = of.stage + (of.sums[start + num] - of.sums[start]) + 2.0 * of.end;
                Length { price, way }
            };
            let longer = (0..ways.len()).filter(|way| num <= self.reach[*way] && num <= room(*way)).map(of);
            longer.min_by(|a, b| a.price.total_cmp(&b.price))
        };
        let most = self.reach.iter().copied().max().unwrap_or(0);
        let before = self.cheapest.last();
        // Neighbours are mostly on one way.
        let mut last = (usize::MAX, 0);
        let mut fits = |way: usize, num: usize| {
            if last.0 != way {
                last = (way, room(way));
            }
            num <= last.1
        };
        let lengths = (1..=before.map_or(most, Vec::len)).map_while(|num| {
            // What was cheapest is it still, if it fits.
            let still = before.map(|all| all[num - 1]).filter(|length| fits(length.way, num));
            still.or_else(|| cheapest(num))
        });
        lengths.collect()
    }
}
