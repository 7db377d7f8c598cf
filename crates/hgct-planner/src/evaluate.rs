//! From a sketch (choices with micro-batch counts) to its simulated step.

use hgct_core::dtype::DType;
use hgct_core::ids::Rank;
use hgct_core::job::PlanShape;
use hgct_core::plan::{Pipeline, Plan, PlanBuilder, ScheduleKind, StageId, StageInstance};
use hgct_core::schedule::Schedule;

use crate::choices::{Choice, in_flight, owned_bytes};
use crate::cost::{Costs, ELEMENT_BYTES, Memory, StageLoad};
use crate::exchange::{Taker, groups, owned, spread};
use crate::fleet::Fleet;
use crate::program::Pricing;
use crate::simulate::step_ns;
use crate::{Error, Result};

/// Pipelines with their micro-batch counts, in their order: which one comes first decides in which
/// order messages leave, and so a little of the time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sketch {
    pub(crate) pipelines: Vec<(Choice, u32)>,
}

impl Sketch {
    pub(crate) fn new(mut pipelines: Vec<(Choice, u32)>) -> Self {
        pipelines.sort_unstable();
        Self { pipelines }
    }
}

/// A sketch with its best owners.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Evaluated {
    pub(crate) sketch: Sketch,
    /// Of its pipelines of more than one stage.
    pub(crate) run_ahead: u32,
    pub(crate) step_ns: u64,
    /// One a rank.
    pub(crate) weights: Vec<f64>,
}

/// A sketch with ranks.
pub(crate) struct Ranked {
    /// Index into `Fleet::devices`, by rank: in the cluster's order.
    pub(crate) devices: Vec<usize>,
    /// Rank of each stage, pipeline by pipeline.
    stage_ranks: Vec<usize>,
}

impl Sketch {
    /// All stages, pipeline by pipeline, with pipeline and position.
    fn stages(&self) -> impl Iterator<Item = (usize, usize, &crate::choices::ChoiceStage)> {
        self.pipelines
            .iter()
            .enumerate()
            .flat_map(|(p, (choice, _))| choice.stages.iter().enumerate().map(move |(at, s)| (p, at, s)))
    }

    /// Gives every stage a device of its class, and ranks in the cluster's order.
    pub(crate) fn ranked(&self, fleet: &Fleet<'_>) -> Ranked {
        let mut next = vec![0; fleet.classes.len()];
        let of_stage: Vec<usize> = self
            .stages()
            .map(|(_, _, stage)| {
                next[stage.class] += 1;
                fleet.classes[stage.class].devices[next[stage.class] - 1]
            })
            .collect();
        let mut devices = of_stage.clone();
        devices.sort_unstable();
        let rank = |d: &usize| devices.binary_search(d).unwrap_or_default();
        Ranked { stage_ranks: of_stage.iter().map(rank).collect(), devices }
    }

    /// Least time of a step, whatever the owners: the pipelines' own bound, and what the exchange
    /// takes from everybody's time however it is spread.
    pub(crate) fn least_ns(&self, fleet: &Fleet<'_>) -> u64 {
        let alone = self.pipelines.iter().map(|(choice, num)| choice.least_ns(*num)).max().unwrap_or(0);
        let takers = self.takers(fleet, 0, false);
        let total = self.shared_elements(fleet);
        let level = spread(&takers, total as f64).map_or(f64::INFINITY, |(level, _)| level);
        // The level is rounded down so that floating point cannot lift the bound.
        alone.max((level * (1.0 - 1e-9)) as u64)
    }

    /// Elements that more than one stage instance holds.
    fn shared_elements(&self, fleet: &Fleet<'_>) -> u64 {
        if self.pipelines.len() > 1 { fleet.shape.num_parameters() } else { 0 }
    }

    /// By stage: when it is done with all but what it owns of what is shared, and the cost of that.
    /// `with_waits`: bubbles count as busy (for choosing owners; not a bound).
    fn takers(&self, fleet: &Fleet<'_>, run_ahead: u32, with_waits: bool) -> Vec<Taker> {
        let num_holders = self.pipelines.len() as u64;
        self.stages()
            .map(|(p, at, stage)| {
                let (device, cost) = fleet.of_class(stage.class);
                let num = self.pipelines[p].1;
                let layers = stage.first_layer..stage.end_layer;
                let held = fleet.shape.stage_parameters(&layers);
                let mut base = cost.import_ns(held) + u64::from(num) * stage.slope_ns;
                if with_waits {
                    base = base.max(stage.fixed_ns + u64::from(num) * stage.slope_ns);
                }
                if num_holders == 1 {
                    // A tied embedding on two stages may be either's; that part is left out.
                    let own = held - fleet.shape.tied_parameters().min(held);
                    base += cost.reduce_ns(own, 1) + cost.update_ns(own);
                    return Taker { base_ns: base as f64, ns_per_element: 0.0, most: f64::INFINITY };
                }
                // Each held element's gradient goes out and its new value comes in, unless it is
                // the rank's own: then all others' come in and go out.
                let crossing = 2.0 * (ELEMENT_BYTES * cost.send_ps_per_byte) as f64 / 1000.0;
                let work = (cost.reduce_ps_per_element * num_holders + cost.update_ps_per_element) as f64;
                let load = self.load(fleet, run_ahead, (p, at), &layers, 0);
                let memory = cost.memory(&fleet.shape, load, device.limit.device_bytes > 0);
                let room = memory.map_or(0, |m| device.limit.host_bytes.saturating_sub(m.host_bytes));
                Taker {
                    base_ns: base as f64 + crossing * held as f64,
                    ns_per_element: work / 1000.0 + crossing * (num_holders - 2) as f64,
                    most: (room as f64 / owned_bytes(num_holders) as f64).min(held as f64),
                }
            })
            .collect()
    }

    fn load<'a>(
        &self,
        fleet: &Fleet<'_>,
        run_ahead: u32,
        (pipeline, position): (usize, usize),
        layers: &'a std::ops::Range<u32>,
        owned: u64,
    ) -> StageLoad<'a> {
        let (choice, num) = &self.pipelines[pipeline];
        let depth = choice.stages.len();
        let later = (depth - position - 1) as u32;
        StageLoad {
            layers,
            micro_batch: choice.micro_batch,
            in_flight: (in_flight(fleet, depth, position, choice.micro_batch) + later * run_ahead).min(*num),
            recompute: choice.stages[position].recompute,
            owned,
            num_holders: self.pipelines.len() as u64,
        }
    }

    /// Memory of every rank, or what is wrong with it.
    pub(crate) fn memory(
        &self,
        fleet: &Fleet<'_>,
        ranked: &Ranked,
        run_ahead: u32,
        owned: &[u64],
    ) -> std::result::Result<Vec<Memory>, Error> {
        let mut memories = vec![Memory::default(); ranked.devices.len()];
        let mut nodes = std::collections::BTreeMap::new();
        for ((p, at, stage), rank) in self.stages().zip(&ranked.stage_ranks) {
            let (device, cost) = fleet.of_class(stage.class);
            let layers = stage.first_layer..stage.end_layer;
            let load = self.load(fleet, run_ahead, (p, at), &layers, owned[*rank]);
            let memory = cost.memory(&fleet.shape, load, device.limit.device_bytes > 0).unwrap_or_default();
            let missing_bytes = device.limit.missing(memory);
            if missing_bytes > 0 {
                let own = memory.device_bytes > device.limit.device_bytes;
                let (needed_bytes, limit_bytes) = if own {
                    (memory.device_bytes, device.limit.device_bytes)
                } else {
                    (memory.host_bytes, device.limit.host_bytes)
                };
                let device = fleet.devices[ranked.devices[*rank]].rank.device.clone();
                return Err(Error::DoesNotFit { device, needed_bytes, limit_bytes, missing_bytes });
            }
            let node = nodes.entry(&device.rank.node).or_insert(0u64);
            *node += memory.host_bytes;
            memories[*rank] = memory;
        }
        for (node, needed_bytes) in nodes {
            let limit_bytes = fleet.nodes.get(node).copied().unwrap_or(u64::MAX);
            if needed_bytes > limit_bytes {
                return Err(Error::NodeFull { node: node.clone(), needed_bytes, limit_bytes });
            }
        }
        Ok(memories)
    }

    /// Simulates and keeps the fastest; `None` where memory does not allow any. Stages run ahead as
    /// long as that helps, which it does where the way between them takes longer than their work.
    pub(crate) fn evaluate(&self, fleet: &Fleet<'_>) -> Result<Option<Evaluated>> {
        let Some(mut best) = self.evaluate_ahead(fleet, 0)? else { return Ok(None) };
        if self.is_held_up_by_links(fleet) {
            for run_ahead in (0..5).map(|power| 1 << power) {
                match self.evaluate_ahead(fleet, run_ahead)? {
                    Some(found) if found.step_ns < best.step_ns => best = found,
                    _ => break,
                }
            }
        }
        Ok(Some(best))
    }

    /// Whether the way to a neighbouring stage and back is a considerable part of a micro-batch.
    fn is_held_up_by_links(&self, fleet: &Fleet<'_>) -> bool {
        self.pipelines.iter().any(|(choice, _)| {
            let bytes = fleet.shape.edge_bytes_per_sample * u64::from(choice.micro_batch);
            let way = |pair: &[crate::choices::ChoiceStage]| {
                let link = fleet.link(pair[0].class, pair[1].class);
                link.latency_ns.saturating_add(link.occupied_ns(bytes))
            };
            let longest = choice.stages.windows(2).map(way).max().unwrap_or(0);
            let work = choice.stages.iter().map(|stage| stage.slope_ns).max().unwrap_or(0);
            longest > work / 8
        })
    }

    /// Simulates with each way to choose owners and keeps the fastest.
    fn evaluate_ahead(&self, fleet: &Fleet<'_>, run_ahead: u32) -> Result<Option<Evaluated>> {
        let ranked = self.ranked(fleet);
        let costs = fleet.costs.select(&ranked.devices);
        let plan = self.bare_plan(fleet, &ranked, run_ahead);
        let schedule = Schedule::of(&plan)?;
        let placed: Vec<_> = plan.stages.iter().map(|s| (s.rank().index(), s.layers())).collect();
        let mut best: Option<Evaluated> = None;
        let mut seen = Vec::new();
        for weights in self.owner_weights(fleet, &ranked, run_ahead, &costs) {
            let groups = groups(&fleet.shape, &placed, &weights);
            if seen.contains(&groups)
                || self.memory(fleet, &ranked, run_ahead, &owned(&groups, ranked.devices.len())).is_err()
            {
                continue;
            }
            let step_ns = step_ns(&plan, &schedule, &groups, &fleet.shape, &costs, Pricing::ALL)?;
            if best.as_ref().is_none_or(|b| step_ns < b.step_ns) {
                best = Some(Evaluated { sketch: self.clone(), run_ahead, step_ns, weights });
            }
            seen.push(groups);
        }
        Ok(best)
    }

    /// Ways to choose owners: by slack (so that all ranks are done at the same time), by the speed
    /// of the update, evenly.
    fn owner_weights(
        &self,
        fleet: &Fleet<'_>,
        ranked: &Ranked,
        run_ahead: u32,
        costs: &Costs,
    ) -> Vec<Vec<f64>> {
        let num = ranked.devices.len();
        let mut ways = Vec::new();
        if self.pipelines.len() > 1 {
            let takers = self.takers(fleet, run_ahead, true);
            if let Some((_, shares)) = spread(&takers, self.shared_elements(fleet) as f64) {
                let mut weights = vec![0.0; num];
                for (share, rank) in shares.iter().zip(&ranked.stage_ranks) {
                    // Whole numbers: the same on every machine, and short in print.
                    weights[*rank] = (share / 1000.0).round();
                }
                ways.push(weights);
            }
            let speed = |d: &crate::cost::DeviceCost| {
                1e6 / (d.reduce_ps_per_element + d.update_ps_per_element).max(1) as f64
            };
            ways.push(costs.devices.iter().map(|d| speed(d).round().max(1.0)).collect());
        }
        ways.push(vec![1.0; num]);
        ways
    }

    /// A plan without owners, hash and prediction.
    fn bare_plan(&self, fleet: &Fleet<'_>, ranked: &Ranked, run_ahead: u32) -> Plan {
        let none = hgct_core::canonical::Hash::of_bytes(b"");
        let mut stages = Vec::new();
        let mut pipelines = Vec::new();
        for (choice, num) in &self.pipelines {
            let first = stages.len() as u32;
            for stage in &choice.stages {
                stages.push(StageInstance {
                    first_layer: stage.first_layer,
                    end_layer: stage.end_layer,
                    ranks: vec![Rank(ranked.stage_ranks[stages.len()] as u32)],
                    recompute: stage.recompute,
                    compute_dtype: DType::F32,
                });
            }
            pipelines.push(Pipeline {
                stages: (first..stages.len() as u32).map(StageId).collect(),
                micro_batch: choice.micro_batch,
                num_micro_batches: *num,
                schedule: ScheduleKind::OneForwardOneBackward,
                run_ahead: if choice.stages.len() > 1 { run_ahead } else { 0 },
            });
        }
        Plan {
            format: Plan::FORMAT,
            parent: None,
            job: none.clone(),
            cluster: None,
            profile: None,
            isolation: fleet.isolation,
            model: fleet.task.model.clone(),
            seq_len: fleet.task.seq_len,
            global_batch: fleet.global_batch,
            ranks: ranked.devices.iter().map(|d| fleet.devices[*d].rank.clone()).collect(),
            stages,
            pipelines,
            owners: Vec::new(),
            wire_dtype: DType::F32,
            master_dtype: DType::F32,
            schedule: none,
            prediction: None,
        }
    }

    /// Share of the step's model flops that each rank computes.
    pub(crate) fn flops_shares(&self, fleet: &Fleet<'_>, ranked: &Ranked) -> Vec<f64> {
        let mut flops = vec![0.0; ranked.devices.len()];
        for ((p, _, stage), rank) in self.stages().zip(&ranked.stage_ranks) {
            let (choice, num) = &self.pipelines[p];
            let samples = f64::from(choice.micro_batch) * f64::from(*num);
            flops[*rank] += samples * fleet.shape.stage_flops(&(stage.first_layer..stage.end_layer));
        }
        let all = fleet.shape.stage_flops(&(0..fleet.shape.num_layers)) * f64::from(fleet.global_batch);
        flops.into_iter().map(|f| f / all).collect()
    }

    /// Whether the policy allows its shape and so many kinds that count.
    pub(crate) fn is_allowed(&self, fleet: &Fleet<'_>, min_kinds: u32) -> bool {
        let policy = fleet.task.policy;
        let used = self.stages().count();
        let shape = match policy.shape {
            PlanShape::Any => true,
            PlanShape::DataParallel => self.pipelines.iter().all(|(choice, _)| choice.stages.len() == 1),
            PlanShape::Pipeline => self.pipelines.len() == 1 && used == fleet.devices.len(),
        };
        let count = self.pipelines.iter().all(|(_, num)| *num <= fleet.max_micro_batches);
        shape && count && self.kinds_that_count(fleet) >= min_kinds
    }

    /// Kinds that compute at least half of what their own speed would give.
    pub(crate) fn kinds_that_count(&self, fleet: &Fleet<'_>) -> u32 {
        let mut done = vec![0.0; fleet.kinds.len()];
        let all = fleet.shape.stage_flops(&(0..fleet.shape.num_layers)) * f64::from(fleet.global_batch);
        for (p, _, stage) in self.stages() {
            let (choice, num) = &self.pipelines[p];
            let samples = f64::from(choice.micro_batch) * f64::from(*num);
            let flops = fleet.shape.stage_flops(&(stage.first_layer..stage.end_layer));
            done[fleet.of_class(stage.class).0.kind] += samples * flops / all;
        }
        let fair = fleet.fair_shares();
        done.iter().zip(&fair).filter(|(done, fair)| **done > 0.0 && **done >= **fair / 2.0).count() as u32
    }
}

impl Evaluated {
    /// The whole plan.
    pub(crate) fn builder(&self, fleet: &Fleet<'_>) -> PlanBuilder {
        let ranked = self.sketch.ranked(fleet);
        let mut builder = PlanBuilder::new(fleet.task.model.clone(), fleet.task.seq_len, fleet.global_batch)
            .ranks(ranked.devices.iter().map(|d| fleet.devices[*d].rank.clone()))
            .isolation(fleet.isolation)
            .owner_weights(self.weights.clone());
        let mut at = 0;
        for (choice, num) in &self.sketch.pipelines {
            let stages: Vec<(Rank, u32)> = choice
                .stages
                .iter()
                .enumerate()
                .map(|(i, s)| (Rank(ranked.stage_ranks[at + i] as u32), s.end_layer - s.first_layer))
                .collect();
            let run_ahead = if stages.len() > 1 { self.run_ahead } else { 0 };
            builder = builder.pipeline(choice.micro_batch, *num, &stages).run_ahead(run_ahead);
            for (stage, (rank, _)) in choice.stages.iter().zip(&stages) {
                if stage.recompute {
                    builder = builder.recompute(*rank);
                }
            }
            at += choice.stages.len();
        }
        builder
    }
}
