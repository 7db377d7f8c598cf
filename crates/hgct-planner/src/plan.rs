//! From the documents to the plan and its reasons.

use std::sync::atomic::{AtomicBool, Ordering};

use hgct_core::canonical::Hash;
use hgct_core::cluster::ClusterSpec;
use hgct_core::job::{JobSpec, MinKinds, PlanShape};
use hgct_core::model::ModelSpec;
use hgct_core::plan::{Plan, Prediction, RankPrediction};
use hgct_core::profile::Profile;
use hgct_core::timeline::Timeline;

use crate::evaluate::Evaluated;
use crate::exchange::owned;
use crate::executable::{plan_many, starts};
use crate::explain::{Explanation, Rejected, explain};
use crate::fleet::{Fleet, Task};
use crate::program::Group;
use crate::search::{Outcome, Space, least_missing, search};
use crate::simulate::simulate;
use crate::{Error, Result};

/// What a plan is made from.
#[derive(Debug, Clone, Copy)]
pub struct PlanInput<'a> {
    /// The job: batch, sequence length and policy.
    pub job: &'a JobSpec,
    /// The model that the job names.
    pub model: &'a ModelSpec,
    /// The cluster with its grants.
    pub cluster: &'a ClusterSpec,
    /// What was measured on it.
    pub profile: &'a Profile,
}

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

    fn part(&self, of: u64) -> Self {
        Self { nodes: (self.nodes / of).max(1), simulations: (self.simulations / of).max(1), stop: self.stop }
    }
}

/// A plan with its reasons.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// The plan, prediction included.
    pub plan: Plan,
    /// Why this one.
    pub explanation: Explanation,
    /// The predicted step.
    pub timeline: Timeline,
}

/// Plans a job: the fastest plan under the profile that the policy allows. A few devices are searched to
/// the end; for many a layout is sought as for clusters of thousands ([`crate::wide`]), and executed.
pub fn plan(input: &PlanInput<'_>, budget: &Budget<'_>) -> Result<Planned> {
    let fleet = Fleet::new(Task::of(input))?;
    let job = Some(input.job.hash());
    if !fleet.is_small() {
        let (outcome, rejected) = plan_many(&fleet, budget)?;
        let Some(best) = outcome.best.clone() else { return Err(no_plan(&fleet, None, &outcome)) };
        return finish(&fleet, &best, &outcome, &none_without(&fleet), rejected, job);
    }
    let policy = &input.job.policy;
    let min_kinds = policy.min_kinds.wanted(fleet.kinds.len() as u32);
    if min_kinds as usize > fleet.kinds.len() {
        return Err(Error::MinKinds {
            wanted: min_kinds,
            reason: format!("there are {} kinds to plan for", fleet.kinds.len()),
        });
    }
    let mut planner =
        Planner { fleet: &fleet, budget, min_kinds, rejected: Vec::new(), start: None, of_any_kinds: None };
    let without = planner.without_each()?;
    planner.others()?;
    planner.layouts();
    let of_any_kinds = planner.of_any_kinds()?;
    let mut rejected = planner.rejected;
    let mut space = Planner::space(fleet.counts(), policy.shape, min_kinds);
    let mut outcome = search(&fleet, &space, planner.start.take(), budget)?;
    // All there are, or as many of them as a plan can give enough to do.
    while policy.min_kinds == MinKinds::All
        && outcome.best.is_none()
        && outcome.finished
        && space.min_kinds > 1
    {
        rejected.push(Rejected::new(&fleet, format!("{} kinds that count", space.min_kinds), &outcome));
        space.min_kinds -= 1;
        outcome = search(&fleet, &space, None, budget)?;
    }
    let Some(best) = outcome.best.clone() else {
        return Err(no_plan(&fleet, Some(&space), &outcome));
    };
    if let Some(other) = of_any_kinds
        && other.best.as_ref().is_some_and(|other| other.step_ns < best.step_ns)
    {
        rejected.push(Rejected::new(&fleet, "without min_kinds".into(), &other));
    }
    finish(&fleet, &best, &outcome, &without, rejected, job)
}

/// Of each class: what is possible without one of its devices.
pub(crate) type Without = Vec<WithoutOne>;

/// Where nothing was searched without a device.
pub(crate) fn none_without(fleet: &Fleet<'_>) -> Without {
    vec![WithoutOne::default(); fleet.classes.len()]
}

/// The step of the best plan that was found without a device.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WithoutOne {
    pub(crate) step_ns: Option<u64>,
    /// There is no plan without it.
    pub(crate) needed: bool,
}

struct Planner<'a> {
    fleet: &'a Fleet<'a>,
    budget: &'a Budget<'a>,
    min_kinds: u32,
    rejected: Vec<Rejected>,
    /// The best so far that the policy allows.
    start: Option<Evaluated>,
    /// The same with however many kinds.
    of_any_kinds: Option<Evaluated>,
}

impl Planner<'_> {
    fn space(counts: Vec<u8>, shape: PlanShape, min_kinds: u32) -> Space {
        Space {
            counts,
            data_parallel: shape == PlanShape::DataParallel,
            one_pipeline: shape == PlanShape::Pipeline,
            min_kinds,
        }
    }

    /// Remembers a plan as the search's start, if the policy allows it.
    fn offer(&mut self, found: Option<&Evaluated>) {
        let Some(found) = found else { return };
        for (best, kinds) in [(&mut self.start, self.min_kinds), (&mut self.of_any_kinds, 0)] {
            if found.sketch.is_allowed(self.fleet, kinds)
                && best.as_ref().is_none_or(|best| found.step_ns < best.step_ns)
            {
                *best = Some(found.clone());
            }
        }
    }

    /// The best plan without one device of each class, in the policy's shape.
    fn without_each(&mut self) -> Result<Without> {
        let fleet = self.fleet;
        let num = fleet.classes.len();
        let mut without = none_without(fleet);
        if fleet.devices.len() == 1 {
            return Ok(without);
        }
        let budget = self.budget.part(4 * num as u64);
        let shape = fleet.task.policy.shape;
        for (class, one) in without.iter_mut().enumerate() {
            let mut counts = fleet.counts();
            counts[class] -= 1;
            // Data parallelism is searched soon, and then bounds the rest.
            let start = match shape {
                PlanShape::Any => {
                    let space = Self::space(counts.clone(), PlanShape::DataParallel, 0);
                    search(fleet, &space, None, &budget)?.best
                }
                _ => None,
            };
            let outcome = search(fleet, &Self::space(counts, shape, 0), start, &budget)?;
            one.step_ns = outcome.best.as_ref().map(|best| best.step_ns);
            one.needed = outcome.best.is_none() && outcome.finished;
            self.offer(outcome.best.as_ref());
        }
        Ok(without)
    }

    /// Plans that a person would think of.
    fn others(&mut self) -> Result<()> {
        let fleet = self.fleet;
        let all = fleet.counts();
        let mut spaces = Vec::new();
        if fleet.devices.len() > 1 {
            spaces.push(("data parallel".to_owned(), Self::space(all.clone(), PlanShape::DataParallel, 0)));
            let one = Self::space(all.clone(), PlanShape::Pipeline, 0);
            spaces.push(("one pipeline over all".to_owned(), one));
        }
        if fleet.kinds.len() > 1 {
            for (k, kind) in fleet.kinds.iter().enumerate() {
                let only = |c: usize| if fleet.of_class(c).0.kind == k { all[c] } else { 0 };
                let counts = (0..all.len()).map(only).collect();
                spaces.push((format!("{kind} alone"), Self::space(counts, PlanShape::Any, 0)));
            }
        }
        let budget = self.budget.part(4 * spaces.len().max(1) as u64);
        for (name, space) in spaces {
            let outcome = search(fleet, &space, None, &budget)?;
            self.offer(outcome.best.as_ref());
            self.rejected.push(Rejected::new(fleet, name, &outcome));
        }
        Ok(())
    }

    /// What the policy's wish for kinds costs: the best with however many; `None` without such a wish.
    fn of_any_kinds(&mut self) -> Result<Option<Outcome>> {
        if self.min_kinds <= 1 {
            return Ok(None);
        }
        let space = Self::space(self.fleet.counts(), self.fleet.task.policy.shape, 0);
        search(self.fleet, &space, self.of_any_kinds.take(), &self.budget.part(4)).map(Some)
    }

    /// What the search over pools would execute: where this one cannot be ended, it is not worse.
    fn layouts(&mut self) {
        if self.fleet.devices.len() > 1 {
            for found in starts(self.fleet, self.budget) {
                self.offer(Some(&found));
            }
        }
    }
}

/// Why nothing was found.
fn no_plan(fleet: &Fleet<'_>, space: Option<&Space>, outcome: &Outcome) -> Error {
    let (missing_bytes, class, memory) = least_missing(fleet, true);
    if missing_bytes > 0 && missing_bytes < u64::MAX {
        let device = fleet.of_class(class).0;
        let own = memory.device_bytes > device.limit.device_bytes;
        let (needed_bytes, limit_bytes) = if own {
            (memory.device_bytes, device.limit.device_bytes)
        } else {
            (memory.host_bytes, device.limit.host_bytes)
        };
        let device = device.rank.device.clone();
        return Error::DoesNotFit { device, needed_bytes, limit_bytes, missing_bytes };
    }
    if !outcome.finished && space.is_some() {
        return Error::Budget;
    }
    let Some(space) = space else {
        let reason = format!(
            "no plan was found that it allows: on {} devices give `policy.shape` and `policy.min_kinds` no wishes, \
             or use fewer devices",
            fleet.devices.len()
        );
        return Error::Shape { reason };
    };
    if space.one_pipeline {
        return Error::Shape {
            reason: format!(
                "one pipeline over all {} devices needs as many layers ({} are there), a common micro-batch \
                 size that divides the global batch, and memory on each",
                fleet.devices.len(),
                fleet.shape.num_layers
            ),
        };
    }
    if space.min_kinds > 0 {
        return Error::MinKinds {
            wanted: space.min_kinds,
            reason: "no plan gives so many kinds half of what their speed would: use a larger global batch \
                     or smaller micro-batches"
                .into(),
        };
    }
    Error::Shape { reason: "no division of the devices has the memory for it".into() }
}

/// Builds the winner with its prediction and explanation.
pub(crate) fn finish(
    fleet: &Fleet<'_>,
    best: &Evaluated,
    outcome: &Outcome,
    without: &Without,
    rejected: Vec<Rejected>,
    job: Option<Hash>,
) -> Result<Planned> {
    let Task { cluster, profile, .. } = fleet.task;
    let job = job.unwrap_or_else(|| Hash::of_bytes(b""));
    let builder = best.builder(fleet).made_from(job, Some(Hash::of(cluster)), Some(Hash::of(profile)));
    let mut plan = builder.build()?;
    let simulation = simulate(&plan, profile)?;
    let ranked = best.sketch.ranked(fleet);
    let groups: Vec<Group> = plan.owners.iter().map(Group::of).collect();
    let memory = best.sketch.memory(fleet, &ranked, best.run_ahead, &owned(&groups, plan.ranks.len()))?;
    let explanation = explain(fleet, best, &plan, &simulation, &memory, outcome, without, rejected)?;
    let gain = |d: &usize| {
        let class = fleet.classes.iter().position(|class| class.devices.contains(d))?;
        let without = without[class].step_ns?;
        Some(crate::explain::permille(without, simulation.step_ns) - 1000)
    };
    let ranks = ranked.devices.iter().zip(&simulation.timeline.ranks).zip(&memory);
    plan.prediction = Some(Prediction {
        step_ns: simulation.step_ns,
        bound_ns: explanation.bound_ns,
        limited_by: explanation.limited_by.clone(),
        ranks: ranks
            .map(|((d, timeline), memory)| RankPrediction {
                compute_ns: timeline.compute_ns(),
                exchange_ns: timeline
                    .actions
                    .iter()
                    .filter(|a| !a.action.operation.has_micro_batch())
                    .map(|a| a.end_ns - a.start_ns)
                    .sum(),
                memory_bytes: memory.total_bytes(),
                gain_permille: gain(d),
            })
            .collect(),
    });
    Ok(Planned { plan, explanation, timeline: simulation.timeline })
}
