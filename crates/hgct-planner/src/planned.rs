//! What every search ends in: the plan that was found, with its prediction and its reasons.

use hgct_core::canonical::Hash;
use hgct_core::plan::{Plan, Prediction, RankPrediction};
use hgct_core::timeline::Timeline;

use crate::Result;
use crate::evaluate::Evaluated;
use crate::exchange::owned;
use crate::explain::{Explanation, Rejected, Without, explain, permille};
use crate::fleet::{Fleet, Task};
use crate::program::Group;
use crate::search::Outcome;
use crate::simulate::simulate;

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
        Some(permille(without, simulation.step_ns) - 1000)
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
