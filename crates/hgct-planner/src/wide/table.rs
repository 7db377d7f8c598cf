//! An instance as prefix sums, so that a stage's time and memory are a few subtractions.

use crate::instance::{CostRow, Held as HeldLayer, Instance, LayerMemory, Schedule, Transfer, Work};

/// A way to place a stage: pool, degrees, replicas, recompute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Choice {
    pub(crate) pool: usize,
    /// Devices of a group: the tensor parallel degree, or more where experts are divided among several
    /// tensor-parallel groups.
    pub(crate) degree: u32,
    /// Tensor parallel degree.
    pub(crate) tensor_parallel: u32,
    /// Index into what stages hold.
    held: usize,
    pub(crate) replicas: u32,
    pub(crate) recompute: bool,
    /// Devices of one instance.
    pub(crate) devices: u32,
    /// What its neighbours see of it: index into [`Table::ends`].
    pub(crate) end: usize,
}

impl Choice {
    /// As [`Stage::expert_parallel`](crate::instance::Stage).
    pub(crate) fn expert_parallel(&self) -> u32 {
        if self.degree > self.tensor_parallel { self.degree } else { 1 }
    }

    /// Groups that divide a micro-batch.
    fn parts(&self) -> u32 {
        self.replicas * (self.degree / self.tensor_parallel)
    }

    /// Whether the other differs in recompute alone, or not at all.
    pub(crate) fn is_alike(&self, other: &Self) -> bool {
        self.pool == other.pool
            && self.degree == other.degree
            && self.tensor_parallel == other.tensor_parallel
            && self.replicas == other.replicas
    }
}

/// How a stage looks from a neighbour: pool and devices that send together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) pool: usize,
    pub(crate) devices: u32,
}

/// Sums over the layers before each layer.
type Prefix = Vec<f64>;

/// Prefix sums of times of one (pool, degree, samples).
#[derive(Debug, Clone)]
struct Times {
    forward: Prefix,
    backward: Prefix,
}

/// Prefix sums of memory at one tensor and expert parallel degree.
#[derive(Debug, Clone)]
struct Held {
    state: Prefix,
    optimizer: Prefix,
    activation: Prefix,
    recompute: Prefix,
    /// Largest activation of any layer of `first..end`, at `first * (layers + 1) + end`.
    largest: Vec<f64>,
}

/// What a stage of one micro-batch needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StageTime {
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) transfer: f64,
}

/// See the module.
pub(crate) struct Table<'a> {
    pub(crate) instance: &'a Instance,
    pub(crate) num_layers: usize,
    pub(crate) choices: Vec<Choice>,
    pub(crate) ends: Vec<End>,
    /// Micro-batch sizes that some choice can run, ascending.
    pub(crate) micro_batches: Vec<u32>,
    /// Gradient bytes of the layers before each layer.
    pub(crate) gradient: Prefix,
    /// By choice, by micro-batch.
    times: Vec<Vec<Option<Times>>>,
    held: Vec<Held>,
    /// Which distinct output size each layer has.
    output: Vec<usize>,
    /// By micro-batch, output size, end from, end to.
    transfers: Vec<Vec<Vec<Vec<f64>>>>,
    /// Replicas of a layer that optimizer state is divided among; changed between searches.
    pub(crate) shards: std::cell::Cell<f64>,
}

fn prefix(values: impl Iterator<Item = f64>) -> Prefix {
    let mut sum = 0.0;
    std::iter::once(0.0)
        .chain(values.map(|x| {
            sum += x;
            sum
        }))
        .collect()
}

/// Tensor parallel degrees with the devices of their groups: as many, and, where experts are divided among
/// more, those. In order of the group's devices.
fn shapes(instance: &Instance) -> Vec<(u32, u32)> {
    let mut shapes: Vec<(u32, u32)> = instance.degrees.iter().map(|degree| (*degree, *degree)).collect();
    shapes.extend(instance.pools.iter().flat_map(|pool| &pool.costs).map(CostRow::shape));
    shapes.sort_unstable_by_key(|(tensor_parallel, group)| (*group, *tensor_parallel));
    shapes.dedup();
    shapes
}

/// Largest value of every range.
fn largest(values: &[f64]) -> Vec<f64> {
    let width = values.len() + 1;
    let mut all = vec![0.0; width * width];
    for first in 0..values.len() {
        let mut most = 0.0f64;
        for end in first..values.len() {
            most = most.max(values[end]);
            all[first * width + end + 1] = most;
        }
    }
    all
}

impl<'a> Table<'a> {
    /// `usable` says which pools and degrees may be used at all.
    pub(crate) fn new(instance: &'a Instance, usable: impl Fn(usize, u32) -> bool) -> Self {
        let classes = instance.layer_classes();
        let mut sizes: Vec<u32> =
            instance.pools.iter().flat_map(|pool| pool.costs.iter().map(CostRow::samples)).collect();
        let most = instance.rules.max_replicas;
        let replicated: Vec<u32> = (2..=most).flat_map(|r| sizes.iter().map(move |b| b * r)).collect();
        sizes.extend(replicated);
        sizes.retain(|b| *b <= instance.global_batch);
        sizes.sort_unstable();
        sizes.dedup();
        let shapes = shapes(instance);
        let (mut choices, mut ends) = (Vec::new(), Vec::<End>::new());
        for (pool, of) in instance.pools.iter().enumerate() {
            for (held, (tensor_parallel, degree)) in shapes.iter().enumerate() {
                let known = of.costs.iter().any(|row| row.shape() == (*tensor_parallel, *degree));
                if *degree > of.devices_per_node || !known || !usable(pool, *degree) {
                    continue;
                }
                for replicas in 1..=most {
                    let devices = degree * replicas;
                    let end = End { pool, devices: devices.min(of.devices_per_node) };
                    let at = ends.iter().position(|e| *e == end).unwrap_or_else(|| {
                        ends.push(end);
                        ends.len() - 1
                    });
                    for recompute in [false, true] {
                        if recompute && !instance.rules.recompute {
                            continue;
                        }
                        choices.push(Choice {
                            pool,
                            degree: *degree,
                            tensor_parallel: *tensor_parallel,
                            held,
                            replicas,
                            recompute,
                            devices,
                            end: at,
                        });
                    }
                }
            }
        }
        let times = choices
            .iter()
            .map(|choice| sizes.iter().map(|b| Self::times(instance, &classes, choice, *b)).collect())
            .collect();
        let held = shapes
            .iter()
            .filter_map(|(tensor_parallel, group)| {
                let degree = instance.degree_index(*tensor_parallel)?;
                let parts = group / tensor_parallel;
                let classes = &classes;
                let of = |get: fn(&LayerMemory) -> f64| {
                    classes.iter().map(move |class| get(&instance.classes[*class].memory[degree]))
                };
                // Each share of the optimizer state that pipelines divide among them.
                let held = |get: fn(&HeldLayer, f64) -> f64| {
                    let of = move |class: &usize| HeldLayer::new(instance, *class, degree, parts);
                    classes.iter().map(move |class| get(&of(class), f64::from(parts)))
                };
                Some(Held {
                    state: prefix(held(|h, _| h.state_bytes)),
                    optimizer: prefix(held(|h, parts| {
                        h.dense_optimizer_bytes / parts + h.expert_optimizer_bytes
                    })),
                    activation: prefix(of(|m| m.activation_bytes)),
                    recompute: prefix(of(|m| m.recompute_bytes)),
                    largest: largest(&of(|m| m.activation_bytes).collect::<Vec<_>>()),
                })
            })
            .collect();
        let mut bytes: Vec<f64> = Vec::new();
        let output = classes
            .iter()
            .map(|class| {
                let size = instance.classes[*class].output_bytes;
                bytes.iter().position(|b| b.total_cmp(&size).is_eq()).unwrap_or_else(|| {
                    bytes.push(size);
                    bytes.len() - 1
                })
            })
            .collect();
        let transfers = sizes
            .iter()
            .map(|b| {
                let of_size = |size: &f64| {
                    let row = |from: &End| {
                        let to = |to: &End| {
                            instance.inter[from.pool][to.pool].seconds(
                                from.devices,
                                to.devices,
                                size * f64::from(*b),
                            )
                        };
                        ends.iter().map(to).collect()
                    };
                    ends.iter().map(row).collect()
                };
                bytes.iter().map(of_size).collect()
            })
            .collect();
        let gradient = prefix(classes.iter().map(|class| instance.classes[*class].gradient_bytes));
        Self {
            instance,
            num_layers: classes.len(),
            choices,
            ends,
            micro_batches: sizes,
            gradient,
            times,
            held,
            output,
            transfers,
            shards: std::cell::Cell::new(1.0),
        }
    }

    fn times(instance: &Instance, classes: &[usize], choice: &Choice, micro_batch: u32) -> Option<Times> {
        if !micro_batch.is_multiple_of(choice.parts()) {
            return None;
        }
        let row = instance.pools[choice.pool].cost_with_experts(
            choice.tensor_parallel,
            choice.expert_parallel(),
            micro_batch / choice.parts(),
        )?;
        let again = |class: usize| if choice.recompute { row.forward_s[class] } else { 0.0 };
        Some(Times {
            forward: prefix(classes.iter().map(|class| row.forward_s[*class])),
            backward: prefix(classes.iter().map(|class| row.backward_s[*class] + again(*class))),
        })
    }

    /// Whether a choice can run micro-batches of that size.
    pub(crate) fn runs(&self, choice: usize, size: usize) -> bool {
        self.times[choice][size].is_some()
    }

    /// Forward and backward of layers `first..end`; infinite where the cost is not known.
    pub(crate) fn compute(&self, choice: usize, size: usize, first: usize, end: usize) -> (f64, f64) {
        match &self.times[choice][size] {
            Some(t) => (t.forward[end] - t.forward[first], t.backward[end] - t.backward[first]),
            None => (f64::INFINITY, f64::INFINITY),
        }
    }

    /// Handing a micro-batch from end to end after `layer`.
    pub(crate) fn transfer(&self, size: usize, layer: usize, from: usize, to: usize) -> f64 {
        self.transfers[size][self.output[layer]][from][to]
    }

    /// Seconds that a stage takes at least to hand a micro-batch on, whatever stands beside it.
    pub(crate) fn least_transfer(&self, size: usize, own: usize) -> f64 {
        let of = |to_ends: &Vec<Vec<f64>>| to_ends[own].iter().copied().fold(f64::INFINITY, f64::min);
        self.transfers[size].iter().map(of).fold(f64::INFINITY, f64::min)
    }

    /// Seconds that a stage takes at most to hand a micro-batch on in one direction.
    pub(crate) fn most_transfer(&self, size: usize) -> f64 {
        self.transfers[size].iter().flatten().flatten().copied().fold(0.0, f64::max)
    }

    /// Peak memory of each device of a stage that may hold so many micro-batches.
    pub(crate) fn memory(&self, choice: usize, size: usize, first: usize, end: usize, in_flight: f64) -> f64 {
        let in_flight = in_flight.min(self.instance.most_in_flight(self.micro_batches[size]));
        let of = &self.choices[choice];
        let held = &self.held[of.held];
        let between = |sums: &Prefix| sums[end] - sums[first];
        let samples = f64::from(self.micro_batches[size] / of.parts());
        let overhead = self.instance.overhead_bytes(of.pool, of.degree);
        let state = between(&held.state) + between(&held.optimizer) / self.shards.get();
        let kept = if of.recompute {
            let working = held.largest[first * (self.num_layers + 1) + end];
            in_flight * between(&held.recompute) + working
        } else {
            in_flight * between(&held.activation)
        };
        state + samples * kept + overhead
    }

    /// Whether memory suffices, with room for rounding.
    pub(crate) fn fits(&self, choice: usize, size: usize, first: usize, end: usize, in_flight: f64) -> bool {
        let limit = self.instance.pools[self.choices[choice].pool].memory_bytes;
        self.memory(choice, size, first, end, in_flight) <= limit * (1.0 - 1e-12)
    }

    /// The pace that a stage allows.
    pub(crate) fn pace(&self, time: StageTime) -> f64 {
        let compute = time.forward + time.backward;
        match self.instance.rules.transfer {
            Transfer::Published | Transfer::Serial => compute + time.transfer,
            Transfer::Overlapped => compute.max(time.transfer),
        }
    }

    /// What a stage on a choice adds to its pipeline's fill.
    pub(crate) fn fill_s(&self, schedule: Schedule, choice: usize, time: StageTime) -> f64 {
        schedule.fill_s(Work {
            forward_s: time.forward,
            backward_s: time.backward,
            transfer_s: time.transfer,
            recompute: self.choices[choice].recompute,
        })
    }

    /// The same of one layer alone, without its transfers.
    pub(crate) fn layer_fill_s(&self, schedule: Schedule, choice: usize, size: usize, layer: usize) -> f64 {
        let (forward, backward) = self.compute(choice, size, layer, layer + 1);
        self.fill_s(schedule, choice, StageTime { forward, backward, transfer: 0.0 })
    }

    /// Transfers of a stage by its neighbours: `after` the end of the next stage, `before` that of the
    /// previous one; `num_stages` is known once the first stage is placed.
    #[allow(clippy::too_many_arguments, reason = "a stage with all that is around it")]
    pub(crate) fn stage_transfer(
        &self,
        size: usize,
        (first, end): (usize, usize),
        own: usize,
        after: Option<usize>,
        before: Option<usize>,
        num_stages: usize,
        schedule: Schedule,
    ) -> f64 {
        let mut activation = after.map_or(0.0, |to| self.transfer(size, end - 1, own, to));
        let mut gradient = before.map_or(0.0, |to| self.transfer(size, first - 1, own, to));
        if self.instance.rules.transfer == Transfer::Published {
            if before.is_none() && num_stages > 3 {
                activation *= 2.0;
            }
            if after.is_none() {
                gradient *= 2.0;
            }
        }
        (activation + gradient) * schedule.transfers()
    }
}
