//! The search: every way to use the devices, in order of what each can promise.
//!
//! A *set* is how many devices of each class take part in one pipeline; the devices in use are
//! divided into sets. For a step time T the search makes all pipelines of every set that could be
//! part of a plan as fast as T ([`crate::choices`]), all divisions, and all distributions of the
//! global batch, drops what cannot keep T, and simulates the rest in order of its bound. T starts at
//! the compute bound and grows until it meets the best simulated step: then nothing faster exists in
//! this search space. What ends it sooner is the caller's budget; the proven gap is then T against
//! the best.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Result;
use crate::choices::{Choice, Request, choices};
use crate::evaluate::{Evaluated, Sketch};
use crate::fleet::Fleet;

/// How long a search may go on. The same budget gives the same plan, byte for byte, unless the stop
/// flag ends it.
#[derive(Debug, Clone, Copy)]
pub struct Budget<'a> {
    /// Partial plans that are looked at.
    pub nodes: u64,
    /// Whole plans that are simulated.
    pub simulations: u64,
    /// Set by the caller to end the search with the best plan so far.
    pub stop: Option<&'a AtomicBool>,
}

impl Default for Budget<'_> {
    /// Well below a second for four devices.
    fn default() -> Self {
        Self { nodes: 20_000_000, simulations: 4_000, stop: None }
    }
}

impl Budget<'_> {
    /// A budget that no small instance exhausts.
    pub const UNLIMITED: Budget<'static> = Budget { nodes: u64::MAX, simulations: u64::MAX, stop: None };

    pub(crate) fn stopped(&self) -> bool {
        self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
    }

    pub(crate) fn part(&self, of: u64) -> Self {
        Self { nodes: (self.nodes / of).max(1), simulations: (self.simulations / of).max(1), stop: self.stop }
    }
}

/// What may be searched.
#[derive(Debug, Clone)]
pub(crate) struct Space {
    /// Devices of each class that may be used.
    pub(crate) counts: Vec<u8>,
    /// Every pipeline one stage.
    pub(crate) data_parallel: bool,
    /// One pipeline over all devices.
    pub(crate) one_pipeline: bool,
    /// Least number of kinds that count.
    pub(crate) min_kinds: u32,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) best: Option<Evaluated>,
    /// No plan of this space is faster.
    pub(crate) proven_ns: u64,
    /// Whether the best is the fastest of the space.
    pub(crate) finished: bool,
    pub(crate) simulated: u64,
}

/// The set of devices of a pipeline, as counts by class.
type Set = Vec<u8>;

/// Searches a space, with `start` as the best so far.
pub(crate) fn search(
    fleet: &Fleet<'_>,
    space: &Space,
    start: Option<Evaluated>,
    budget: &Budget<'_>,
) -> Result<Outcome> {
    let bound = fleet.bound_of(&space.counts).step_ns(fleet.global_batch);
    let last = last_step_ns(fleet, space);
    let mut round = Round {
        fleet,
        space,
        budget,
        nodes: budget.nodes,
        simulations: Cell::new(budget.simulations),
        best: start,
        from_ns: 0,
        to_ns: bound.max(1),
        leaves: Vec::new(),
        pools: Vec::new(),
        first_only: false,
    };
    let outcome = |round: &Round<'_>, proven_ns: u64, finished: bool| Outcome {
        best: round.best.clone(),
        proven_ns: round.best.as_ref().map_or(proven_ns, |b| b.step_ns.min(proven_ns)),
        finished,
        simulated: budget.simulations.saturating_sub(round.simulations.get()),
    };
    for number in 0..MAX_ROUNDS {
        if let Some(best) = &round.best {
            round.to_ns = round.to_ns.min(best.step_ns.saturating_sub(1));
        }
        if round.to_ns > round.from_ns || number == 0 {
            let complete = round.enumerate();
            let all = round.simulate_leaves()?;
            if complete.is_none() || !all {
                let proven = round.from_ns.max(bound);
                if round.best.is_none() && !budget.stopped() {
                    round.dive(last)?;
                }
                return Ok(outcome(&round, proven, false));
            }
        }
        let best_ns = round.best.as_ref().map_or(u64::MAX, |b| b.step_ns);
        if round.to_ns >= best_ns.saturating_sub(1) || round.to_ns > last {
            return Ok(outcome(&round, best_ns.min(last), true));
        }
        round.from_ns = round.to_ns;
        // Slowly at first: the step is mostly near its bound, and each round costs more than all before.
        let growth = if number < 30 { 100 } else { 3 };
        round.to_ns = round.to_ns.saturating_add(round.to_ns / growth + 1);
    }
    let proven = round.from_ns;
    Ok(outcome(&round, proven, false))
}

const MAX_ROUNDS: u32 = 400;
/// Nodes and simulations of each try for any plan at all, once the budget is gone.
const DIVE_NODES: u64 = 50_000;
const DIVE_SIMULATIONS: u64 = 20;
/// Leaves of a round at most; more would need too much memory.
const MAX_LEAVES: usize = 1 << 20;

/// A time that no plan which fits needs: all work on each device one after another, several times.
fn last_step_ns(fleet: &Fleet<'_>, space: &Space) -> u64 {
    let counts = fleet.shape.counts(&(0..fleet.shape.num_layers));
    let mut sum = 0u64;
    for class in (0..space.counts.len()).filter(|c| space.counts[*c] > 0) {
        let (device, cost) = fleet.of_class(class);
        for size in device.sizes.iter().filter_map(|b| cost.size(*b)) {
            let num = u64::from(fleet.global_batch.div_ceil(size.micro_batch));
            let edge = fleet.shape.edge_bytes_per_sample * u64::from(size.micro_batch);
            let links = fleet.costs.links.iter().flatten();
            let crossing = links.map(|l| l.occupied_ns(edge) + l.latency_ns).max().unwrap_or(0);
            let one = 2 * size.forward(counts)
                + size.backward(counts)
                + 2 * cost.action_overhead_ns
                + 8 * (cost.send_ns(edge) + crossing);
            sum = sum.saturating_add(num.saturating_mul(one.saturating_mul(2)));
        }
        let held = fleet.shape.num_parameters();
        let exchange = cost.import_ns(held) + cost.update_ns(held) + cost.reduce_ns(held, 16);
        sum = sum.saturating_add(exchange * 2 + cost.send_ns(64 * held));
    }
    sum
}

/// What a set can do in the round's time.
struct Pool {
    set: Set,
    choices: Vec<Choice>,
    most_samples: u32,
    least_samples: u32,
}

/// A pipeline of a leaf: its pool, its choice in the pool, its micro-batches.
type Part = (u16, u32, u32);

struct Round<'a> {
    fleet: &'a Fleet<'a>,
    space: &'a Space,
    budget: &'a Budget<'a>,
    nodes: u64,
    simulations: Cell<u64>,
    best: Option<Evaluated>,
    /// Everything up to here is done.
    from_ns: u64,
    to_ns: u64,
    leaves: Vec<(u64, Vec<Part>)>,
    pools: Vec<Pool>,
    /// Whether a set's first choice is enough: to have any plan at all.
    first_only: bool,
}

impl Round<'_> {
    /// Collects all sketches whose bound is in `from_ns..=to_ns`; `None` when out of nodes.
    fn enumerate(&mut self) -> Option<()> {
        self.leaves.clear();
        self.pools.clear();
        self.make_pools()?;
        let mut chosen = Vec::new();
        let left = self.space.counts.clone();
        self.divide(0, &left, 0, &mut chosen)
    }

    /// Finds any plan: a time that grows quickly, and few nodes for each.
    fn dive(&mut self, last: u64) -> Result<()> {
        self.first_only = true;
        while self.best.is_none() && self.to_ns <= last {
            self.nodes = DIVE_NODES;
            self.simulations.set(self.simulations.get().max(DIVE_SIMULATIONS));
            let _ = self.enumerate();
            self.simulate_leaves()?;
            self.to_ns = self.to_ns.saturating_add(self.to_ns / 20 + 1);
        }
        Ok(())
    }

    fn make_pools(&mut self) -> Option<()> {
        let fleet = self.fleet;
        let price = |set: &[u8]| -> f64 {
            set.iter().zip(&fleet.classes).map(|(n, class)| f64::from(*n) * class.price).sum()
        };
        let all = price(&self.space.counts);
        for set in self.sets() {
            let own = price(&set);
            let most_of_rest = fleet.bound.most_samples((all - own).max(0.0), self.to_ns);
            let rest = if self.space.one_pipeline { 0.0 } else { most_of_rest.min(f64::from(u32::MAX)) };
            let need = fleet.global_batch.saturating_sub(rest as u32);
            if fleet.bound.most_samples(own, self.to_ns) < f64::from(need) {
                continue;
            }
            let request = Request { set: &set, step_ns: self.to_ns, need, first_only: self.first_only };
            let choices = choices(fleet, &request, &mut self.nodes)?;
            let (Some(most), Some(least)) =
                (choices.iter().map(|c| c.most_samples).max(), choices.iter().map(|c| c.micro_batch).min())
            else {
                continue;
            };
            self.pools.push(Pool { set, choices, most_samples: most, least_samples: least });
        }
        Some(())
    }

    /// All sets that the space allows, in a fixed order.
    fn sets(&self) -> Vec<Set> {
        let counts = &self.space.counts;
        if self.space.one_pipeline {
            return vec![counts.clone()];
        }
        let mut sets: Vec<Set> = vec![Vec::new()];
        for most in counts {
            sets = sets
                .into_iter()
                .flat_map(|set| (0..=*most).map(move |n| [set.as_slice(), &[n]].concat()))
                .collect();
        }
        let size = |set: &Set| set.iter().map(|n| u32::from(*n)).sum::<u32>();
        let most = if self.space.data_parallel { 1 } else { self.fleet.shape.num_layers };
        sets.retain(|set| (1..=most).contains(&size(set)));
        sets
    }

    /// Divides what is left of the devices into pools from `first` on.
    fn divide(&mut self, first: usize, left: &[u8], samples: u64, chosen: &mut Vec<usize>) -> Option<()> {
        let batch = u64::from(self.fleet.global_batch);
        if !chosen.is_empty() && samples >= batch && self.enough_kinds(chosen) {
            let most: Vec<u32> = chosen.iter().map(|p| self.pools[*p].most_samples).collect();
            self.distribute(chosen, &most, self.fleet.global_batch, &mut Vec::new())?;
        }
        for pool in first..self.pools.len() {
            self.nodes = self.nodes.checked_sub(1)?;
            let set = &self.pools[pool].set;
            if set.iter().zip(left).any(|(n, left)| n > left) {
                continue;
            }
            let rest: Vec<u8> = left.iter().zip(set).map(|(left, n)| left - n).collect();
            let samples = samples + u64::from(self.pools[pool].most_samples);
            let price: f64 =
                rest.iter().zip(&self.fleet.classes).map(|(n, class)| f64::from(*n) * class.price).sum();
            let of_rest = self.fleet.bound.most_samples(price, self.to_ns);
            if (samples as f64) + of_rest < batch as f64 {
                continue;
            }
            chosen.push(pool);
            self.divide(pool, &rest, samples, chosen)?;
            chosen.pop();
        }
        Some(())
    }

    fn enough_kinds(&self, chosen: &[usize]) -> bool {
        let fleet = self.fleet;
        let mut kinds = vec![false; fleet.kinds.len()];
        for pool in chosen {
            for (class, n) in self.pools[*pool].set.iter().enumerate() {
                kinds[fleet.of_class(class).0.kind] |= *n > 0;
            }
        }
        kinds.iter().filter(|k| **k).count() as u32 >= self.space.min_kinds
    }

    /// Gives the samples that are left to the pools after `parts`.
    fn distribute(&mut self, chosen: &[usize], most: &[u32], left: u32, parts: &mut Vec<Part>) -> Option<()> {
        let at = parts.len();
        if at == chosen.len() {
            self.leaf(parts);
            return (self.leaves.len() < MAX_LEAVES).then_some(());
        }
        let pool = chosen[at];
        let later: u64 = most[at + 1..].iter().map(|m| u64::from(*m)).sum();
        let reserved: u32 = chosen[at + 1..].iter().map(|p| self.pools[*p].least_samples).sum();
        let Some(available) = left.checked_sub(reserved) else { return Some(()) };
        let need = u64::from(left).saturating_sub(later);
        for index in 0..self.pools[pool].choices.len() {
            let Choice { most_samples, micro_batch, .. } = self.pools[pool].choices[index];
            self.nodes = self.nodes.checked_sub(1)?;
            if u64::from(most_samples) < need {
                break;
            }
            let high = most_samples.min(available) / micro_batch;
            let low = (need.div_ceil(u64::from(micro_batch)) as u32).max(1);
            for num in (low..=high).rev() {
                let rest = left - num * micro_batch;
                if at + 1 == chosen.len() && rest > 0 {
                    break;
                }
                // Alike pools in one order only.
                let part = (pool as u16, index as u32, num);
                if parts.last().is_some_and(|last| last.0 == part.0 && (last.1, last.2) > (part.1, part.2)) {
                    continue;
                }
                self.nodes = self.nodes.checked_sub(1)?;
                parts.push(part);
                self.distribute(chosen, most, rest, parts)?;
                parts.pop();
            }
        }
        Some(())
    }

    fn leaf(&mut self, parts: &[Part]) {
        let sketch = self.sketch(parts);
        let least = sketch.least_ns(self.fleet);
        if (self.from_ns < least || self.from_ns == 0)
            && least <= self.to_ns
            && (self.space.min_kinds <= 1 || sketch.kinds_that_count(self.fleet) >= self.space.min_kinds)
        {
            self.leaves.push((least, parts.to_vec()));
        }
    }

    fn sketch(&self, parts: &[Part]) -> Sketch {
        let pipeline = |part: &Part| {
            let choice = self.pools[usize::from(part.0)].choices[part.1 as usize].clone();
            (choice, part.2)
        };
        Sketch::new(parts.iter().map(pipeline).collect())
    }

    /// Simulates the round's leaves, best bound first; false when out of simulations or stopped.
    fn simulate_leaves(&mut self) -> Result<bool> {
        let mut leaves = std::mem::take(&mut self.leaves);
        leaves.sort_unstable();
        for (least, parts) in leaves {
            if self.best.as_ref().is_some_and(|best| least >= best.step_ns) {
                return Ok(true);
            }
            if self.simulations.get() == 0 || self.budget.stopped() {
                return Ok(false);
            }
            self.simulations.set(self.simulations.get() - 1);
            if let Some(found) = self.sketch(&parts).evaluate(self.fleet)?
                && self.best.as_ref().is_none_or(|best| found.step_ns < best.step_ns)
            {
                self.best = Some(found);
            }
        }
        Ok(true)
    }
}

/// Fewest bytes that are missing on the worst device, over all cuts into one pipeline of the
/// devices (each in its own grant, recompute on, smallest micro-batches): 0 where it fits.
pub(crate) fn least_missing(fleet: &Fleet<'_>, owned: bool) -> (u64, usize, crate::cost::Memory) {
    use crate::cost::{Memory, StageLoad};
    let num_layers = fleet.shape.num_layers;
    let mut nobody: BTreeMap<(Set, u32), (u64, usize, Memory)> = BTreeMap::new();
    // From the last stage to the first, so that micro-batches in flight are known.
    let start: Set = vec![0; fleet.classes.len()];
    nobody.insert((start, num_layers), (0, 0, Memory::default()));
    let counts = fleet.counts();
    let mut best: Option<(u64, usize, Memory)> = None;
    let total: u32 = counts.iter().map(|n| u32::from(*n)).sum();
    for after in 0..total.min(num_layers) {
        let mut next: BTreeMap<(Set, u32), (u64, usize, Memory)> = BTreeMap::new();
        for ((used, end), so_far) in &nobody {
            for class in (0..counts.len()).filter(|c| used[*c] < counts[*c]) {
                let (device, cost) = fleet.of_class(class);
                let Some(micro_batch) = device.sizes.first().copied() else { continue };
                for first in 0..*end {
                    let layers = first..*end;
                    let held = fleet.shape.stage_parameters(&layers);
                    let load = |recompute| StageLoad {
                        layers: &layers,
                        micro_batch,
                        in_flight: after + 1,
                        recompute,
                        owned: if owned { held } else { 0 },
                        num_holders: 1,
                    };
                    let own = device.limit.device_bytes > 0;
                    let memory = [true, false]
                        .into_iter()
                        .filter_map(|r| cost.memory(&fleet.shape, load(r), own))
                        .min_by_key(|m| device.limit.missing(*m));
                    let Some(memory) = memory else { continue };
                    let missing = device.limit.missing(memory);
                    let worst = if missing >= so_far.0 { (missing, class, memory) } else { *so_far };
                    if first == 0 {
                        if best.is_none_or(|b| worst.0 < b.0) {
                            best = Some(worst);
                        }
                        continue;
                    }
                    let mut used = used.clone();
                    used[class] += 1;
                    let entry = next.entry((used, first)).or_insert(worst);
                    if worst.0 < entry.0 {
                        *entry = worst;
                    }
                }
            }
        }
        nobody = next;
    }
    best.unwrap_or((u64::MAX, 0, Memory::default()))
}
