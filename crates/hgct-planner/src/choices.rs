//! Pipelines of a set of devices: orders, layer cuts and micro-batch sizes, and a bound on the time
//! of each.
//!
//! A pipeline with m micro-batches is not faster than any of its stages: the first micro-batch must
//! come through the stages before it, the stage does m forwards and backwards, and the last
//! backward must go back through the stages before it. So its time is at least
//! max over stages of `fixed + m · slope`.

use crate::cost::{ELEMENT_BYTES, Memory, StageLoad};
use crate::fleet::Fleet;

/// One way to run a pipeline, without the number of its micro-batches.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Choice {
    pub(crate) micro_batch: u32,
    pub(crate) stages: Vec<ChoiceStage>,
    /// Most samples that it does in the time it was made for; last, so that the order of choices
    /// does not depend on that time.
    pub(crate) most_samples: u32,
}

/// One stage of a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ChoiceStage {
    pub(crate) class: usize,
    pub(crate) first_layer: u32,
    pub(crate) end_layer: u32,
    pub(crate) recompute: bool,
    /// Time at least beside its micro-batches.
    pub(crate) fixed_ns: u64,
    /// Time a micro-batch.
    pub(crate) slope_ns: u64,
}

impl Choice {
    /// Least time of a step with `num` micro-batches.
    pub(crate) fn least_ns(&self, num: u32) -> u64 {
        self.stages.iter().map(|s| s.fixed_ns + u64::from(num) * s.slope_ns).max().unwrap_or(0)
    }
}

/// The choice of given stages, each (class, layer past the last, recompute); `None` at a size of
/// micro-batch that one of them has no costs for.
pub(crate) fn choice(fleet: &Fleet<'_>, micro_batch: u32, stages: &[(usize, u32, bool)]) -> Option<Choice> {
    let request = Request { set: &[], step_ns: u64::MAX, need: 1, first_only: true };
    let mut search = Search {
        fleet,
        request: &request,
        depth: stages.len(),
        micro_batch,
        least: 1,
        left: Vec::new(),
        stages: Vec::with_capacity(stages.len()),
        found: &mut Vec::new(),
        nodes: &mut 0,
    };
    let mut front = Front { next_layer: 0, start_ns: 0, tail_ns: 0, most: u32::MAX };
    for (class, end, recompute) in stages {
        front = search.place(*class, &front, *end, *recompute)?;
    }
    Some(Choice { micro_batch, stages: search.stages, most_samples: 0 })
}

/// What a set of devices may do in a given time.
pub(crate) struct Request<'a> {
    /// Devices of each class, all of which take part.
    pub(crate) set: &'a [u8],
    /// Within this time.
    pub(crate) step_ns: u64,
    /// Samples at least.
    pub(crate) need: u32,
    /// One is enough.
    pub(crate) first_only: bool,
}

/// All choices for a set of devices that do at least `need` samples in `step_ns`, most samples
/// first. Counts what it looks at in `nodes`; incomplete if it runs out (`None`).
pub(crate) fn choices(fleet: &Fleet<'_>, request: &Request<'_>, nodes: &mut u64) -> Option<Vec<Choice>> {
    let depth: usize = request.set.iter().map(|n| usize::from(*n)).sum();
    let mut found = Vec::new();
    if depth == 0 || depth > fleet.shape.num_layers as usize {
        return Some(found);
    }
    let members: Vec<usize> = (0..request.set.len()).filter(|c| request.set[*c] > 0).collect();
    let sizes = &fleet.of_class(members[0]).0.sizes;
    for micro_batch in sizes {
        if members.iter().any(|c| !fleet.of_class(*c).0.sizes.contains(micro_batch)) {
            continue;
        }
        let most = fleet.max_micro_batches.min(fleet.global_batch / micro_batch);
        if most == 0 {
            continue;
        }
        let mut search = Search {
            fleet,
            request,
            depth,
            micro_batch: *micro_batch,
            least: request.need.div_ceil(*micro_batch).max(1),
            left: request.set.to_vec(),
            stages: Vec::with_capacity(depth),
            found: &mut found,
            nodes,
        };
        search.extend(&Front { next_layer: 0, start_ns: 0, tail_ns: 0, most })?;
    }
    found.sort_unstable_by(|a, b| b.most_samples.cmp(&a.most_samples).then_with(|| a.cmp(b)));
    found.dedup();
    Some(found)
}

struct Search<'a, 'b> {
    fleet: &'a Fleet<'a>,
    request: &'a Request<'a>,
    depth: usize,
    micro_batch: u32,
    /// Micro-batches at least.
    least: u32,
    left: Vec<u8>,
    stages: Vec<ChoiceStage>,
    found: &'b mut Vec<Choice>,
    nodes: &'b mut u64,
}

/// What the stages so far mean for the next.
#[derive(Clone)]
struct Front {
    next_layer: u32,
    /// When the first activation can be at the next stage.
    start_ns: u64,
    /// From the next stage's last backward to the first stage's.
    tail_ns: u64,
    /// Micro-batches at most.
    most: u32,
}

impl Search<'_, '_> {
    /// Tries every next stage; `None` when out of nodes.
    fn extend(&mut self, front: &Front) -> Option<()> {
        let num_layers = self.fleet.shape.num_layers;
        let position = self.stages.len();
        if position == self.depth {
            if front.next_layer == num_layers {
                self.found.push(Choice {
                    most_samples: front.most * self.micro_batch,
                    micro_batch: self.micro_batch,
                    stages: self.stages.clone(),
                });
            }
            return Some(());
        }
        let after = (self.depth - position - 1) as u32;
        for class in 0..self.left.len() {
            if self.left[class] == 0 {
                continue;
            }
            self.left[class] -= 1;
            let ends =
                if after == 0 { num_layers..=num_layers } else { front.next_layer + 1..=num_layers - after };
            for end in ends {
                if self.request.first_only && !self.found.is_empty() {
                    break;
                }
                *self.nodes = self.nodes.checked_sub(1)?;
                if !self.rest_is_enough(end) {
                    continue;
                }
                let mut any = false;
                for recompute in self.ways(class, front.next_layer..end) {
                    let Some(next) = self.place(class, front, end, recompute) else { continue };
                    any = true;
                    self.extend(&next)?;
                    self.stages.pop();
                }
                // More layers need more time and more memory.
                if !any {
                    break;
                }
            }
            self.left[class] += 1;
        }
        Some(())
    }

    /// Whether the devices that are left can do the layers that are left for all that is needed,
    /// at the prices of the compute bound.
    fn rest_is_enough(&self, end: u32) -> bool {
        let fleet = self.fleet;
        let left: f64 = (0..self.left.len()).map(|c| f64::from(self.left[c]) * fleet.classes[c].price).sum();
        let counts = fleet.shape.counts(&(end..fleet.shape.num_layers));
        let a_sample: f64 = (0..3).map(|k| counts[k] as f64 * fleet.least_priced[k]).sum();
        let samples = f64::from(self.least) * f64::from(self.micro_batch);
        a_sample * samples <= left * self.request.step_ns as f64 * (1.0 + 1e-9) + 1.0
    }

    /// Without recompute where that fits; with it where memory forces it, be it with the optimizer
    /// state of all that the stage holds or even without any.
    fn ways(&self, class: usize, layers: std::ops::Range<u32>) -> Vec<bool> {
        let fleet = self.fleet;
        let (device, cost) = fleet.of_class(class);
        let position = self.stages.len();
        let fits = |recompute: bool, owned: u64| {
            let load = StageLoad {
                layers: &layers,
                micro_batch: self.micro_batch,
                in_flight: in_flight(fleet, self.depth, position, self.micro_batch),
                recompute,
                owned,
                num_holders: 1,
            };
            let own_memory = device.limit.device_bytes > 0;
            cost.memory(&fleet.shape, load, own_memory).is_some_and(|m: Memory| device.limit.missing(m) == 0)
        };
        let all = fleet.shape.stage_parameters(&layers);
        match (fits(false, 0), fits(false, all)) {
            (true, false) if fits(true, 0) => vec![false, true],
            (true, _) => vec![false],
            (false, _) if fits(true, 0) => vec![true],
            (false, _) => vec![],
        }
    }

    /// Adds a stage; `None` if it is too slow.
    fn place(&mut self, class: usize, front: &Front, end: u32, recompute: bool) -> Option<Front> {
        let fleet = self.fleet;
        let (_, cost) = fleet.of_class(class);
        let size = cost.size(self.micro_batch)?;
        let layers = front.next_layer..end;
        let counts = fleet.shape.counts(&layers);
        let forward = cost.action_overhead_ns + size.forward(counts);
        let again = if recompute { size.forward(counts) } else { 0 };
        let backward = cost.action_overhead_ns + again + size.backward(counts);
        let edge = fleet.shape.edge_bytes_per_sample * u64::from(self.micro_batch);
        let hop = cost.send_ns(edge);
        let has_previous = layers.start > 0;
        let num_edges = u64::from(has_previous) + u64::from(end < fleet.shape.num_layers);
        let slope_ns = forward + backward + 2 * num_edges * hop;

        let crossing = |from: usize, to: usize| {
            let link = fleet.link(from, to);
            link.occupied_ns(edge) + link.latency_ns
        };
        let (arrives, tail_ns) = match self.stages.last() {
            Some(previous) => (
                front.start_ns + crossing(previous.class, class),
                front.tail_ns + crossing(class, previous.class),
            ),
            None => (0, 0),
        };
        let import = cost.import_ns(fleet.shape.stage_parameters(&layers));
        let fixed_ns = arrives.max(import) + tail_ns;
        let time = self.request.step_ns.checked_sub(fixed_ns)?;
        let most = u64::from(front.most).min(time / slope_ns.max(1)) as u32;
        if most < self.least {
            return None;
        }
        self.stages.push(ChoiceStage {
            class,
            first_layer: layers.start,
            end_layer: end,
            recompute,
            fixed_ns,
            slope_ns,
        });
        // Receiving and sending around this stage's own first forward and last backward.
        let received = if has_previous { hop } else { 0 };
        Some(Front {
            next_layer: end,
            start_ns: arrives.max(import) + received + forward + hop,
            tail_ns: tail_ns + received + backward + hop,
            most,
        })
    }
}

/// Micro-batches in flight at most in a 1F1B pipeline.
pub(crate) fn in_flight(fleet: &Fleet<'_>, depth: usize, position: usize, micro_batch: u32) -> u32 {
    let most = fleet.max_micro_batches.min(fleet.global_batch / micro_batch.max(1)).max(1);
    ((depth - position) as u32).min(most)
}

/// Bytes of host memory that each further owned element takes.
pub(crate) fn owned_bytes(num_holders: u64) -> u64 {
    // Master, m and v, the sum and a buffer for each contribution of others, less the buffers that its
    // gradient and new value would take elsewhere.
    let others = num_holders.saturating_sub(1);
    ELEMENT_BYTES * (3 + u64::from(others > 0) + others - 2)
}
