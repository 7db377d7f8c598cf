//! Who updates what, as numbers: the same cut that core derives with names.

use std::ops::Range;

use crate::cost::ModelShape;
use crate::program::Group;

/// A stage instance: its rank and its layers.
pub(crate) type Placed = (usize, Range<u32>);

/// The owned groups of stage instances under `weights` (one a rank), in the order of the plan.
pub(crate) fn groups(shape: &ModelShape, stages: &[Placed], weights: &[f64]) -> Vec<Group> {
    let mut groups = Vec::new();
    for layer in 0..shape.num_layers {
        let tied = shape.tied_parameters() > 0 && layer == 0;
        let holds = |layers: &Range<u32>| {
            if layers.contains(&layer) {
                Some(layer)
            } else if tied && layers.contains(&(shape.num_layers - 1)) {
                Some(shape.num_layers - 1)
            } else {
                None
            }
        };
        let holders: Vec<(u32, u32)> = (0u32..)
            .zip(stages)
            .filter_map(|(id, (_, layers))| holds(layers).map(|layer| (id, layer)))
            .collect();
        if holders.is_empty() {
            continue;
        }
        let mut ranks: Vec<usize> = holders.iter().map(|(id, _)| stages[*id as usize].0).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let elements = cut(shape.layer_blocks(layer), &ranks, weights);
        for (owner, elements) in ranks.into_iter().zip(elements) {
            if elements > 0 {
                groups.push(Group { owner, elements, holders: holders.clone() });
            }
        }
    }
    groups
}

/// Elements of each rank when blocks are cut in proportion to weights, as core's `derive_owners`.
fn cut(blocks: &[u64], ranks: &[usize], weights: &[f64]) -> Vec<u64> {
    let weight = |rank: &usize| weights.get(*rank).copied().unwrap_or(1.0).max(0.0);
    let sum: f64 = ranks.iter().map(weight).sum();
    let total: u64 = blocks.iter().sum();
    let mut share = 0.0;
    let ends: Vec<u64> = ranks
        .iter()
        .map(|rank| {
            share += if sum > 0.0 { weight(rank) / sum } else { 1.0 / ranks.len() as f64 };
            (share * total as f64).round() as u64
        })
        .collect();
    let mut owned = vec![0; ranks.len()];
    let mut passed = 0;
    for elements in blocks {
        let middle = passed + elements / 2;
        let at = ends.iter().position(|end| middle < *end).unwrap_or(ranks.len() - 1);
        owned[at] += elements;
        passed += elements;
    }
    owned
}

/// Elements that each of `num_ranks` ranks owns.
pub(crate) fn owned(groups: &[Group], num_ranks: usize) -> Vec<u64> {
    let mut owned = vec![0; num_ranks];
    for group in groups {
        owned[group.owner] += group.elements;
    }
    owned
}

/// A rank that may take update work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taker {
    /// When it is done with everything else.
    pub(crate) base_ns: f64,
    /// What each further element costs it.
    pub(crate) ns_per_element: f64,
    /// Elements that its memory allows at most.
    pub(crate) most: f64,
}

/// Spreads `total` elements so that the last rank is done as early as possible (water-filling): the
/// level, and how much each takes. `None` where memory does not allow it.
pub(crate) fn spread(takers: &[Taker], total: f64) -> Option<(f64, Vec<f64>)> {
    let least = takers.iter().map(|t| t.base_ns).fold(0.0, f64::max);
    let room: f64 = takers.iter().map(|t| t.most).sum();
    if room < total {
        return None;
    }
    let takes = |t: &Taker, level: f64| {
        let free = (level - t.base_ns).max(0.0);
        let most = if t.ns_per_element > 0.0 { free / t.ns_per_element } else { f64::INFINITY };
        most.min(t.most).min(total)
    };
    let (mut low, mut high) = (0.0, least + 1.0);
    for taker in takers {
        high = high.max(taker.base_ns + taker.ns_per_element * total);
    }
    // 60 halvings leave less than a nanosecond of any step below years.
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if takers.iter().map(|t| takes(t, middle)).sum::<f64>() < total {
            low = middle;
        } else {
            high = middle;
        }
    }
    Some((low, takers.iter().map(|t| takes(t, high)).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn water_fills_the_valleys_first() {
        let taker = |base_ns| Taker { base_ns, ns_per_element: 1.0, most: 1e9 };
        let (level, shares) = spread(&[taker(10.0), taker(0.0), taker(100.0)], 30.0).unwrap();
        assert!((level - 20.0).abs() < 1e-6, "{level}");
        assert!((shares[0] - 10.0).abs() < 1e-6 && (shares[1] - 20.0).abs() < 1e-6 && shares[2] == 0.0);
    }

    #[test]
    fn memory_caps_a_share() {
        let taker = |most| Taker { base_ns: 0.0, ns_per_element: 1.0, most };
        let (level, shares) = spread(&[taker(5.0), taker(100.0)], 30.0).unwrap();
        assert!((level - 25.0).abs() < 1e-6 && (shares[0] - 5.0).abs() < 1e-9, "{level} {shares:?}");
        assert!(spread(&[taker(5.0), taker(20.0)], 30.0).is_none());
    }
}
