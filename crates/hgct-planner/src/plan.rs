//! From the documents to the plan and its reasons.

use hgct_core::cluster::ClusterSpec;
use hgct_core::job::{JobSpec, MinKinds, PlanShape};
use hgct_core::model::ModelSpec;
use hgct_core::profile::Profile;

use crate::evaluate::Evaluated;
use crate::executable::{plan_many, starts};
use crate::explain::{Rejected, Without, none_without};
use crate::fleet::{Fleet, Task};
use crate::planned::{Planned, finish};
use crate::search::{Budget, Outcome, Space, least_missing, search};
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

impl<'a> From<&PlanInput<'a>> for Task<'a> {
    fn from(input: &PlanInput<'a>) -> Self {
        let PlanInput { job, model, cluster, profile } = *input;
        let (global_batch, seq_len) = (job.recipe.global_batch, job.recipe.seq_len);
        Self { policy: &job.policy, global_batch, seq_len, model, cluster, profile }
    }
}

/// Plans a job: the fastest plan under the profile that the policy allows. A few devices are searched to
/// the end; for many a layout is sought as for clusters of thousands ([`crate::wide`]), and executed.
pub fn plan(input: &PlanInput<'_>, budget: &Budget<'_>) -> Result<Planned> {
    let fleet = Fleet::new(Task::from(input))?;
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
