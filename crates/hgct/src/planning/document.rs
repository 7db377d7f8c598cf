//! What `hgct plan --json` prints: the same keys for a job's plan as for a layout.

use hgct_planner::answer::{Answer, Basis, Why};
use hgct_planner::{Explanation, Planned};
use serde_json::{Value, json};

/// Of a layout.
pub(super) fn of_answer(answer: &Answer, why: &Why, search_seconds: f64) -> Value {
    let prediction = &answer.prediction;
    let executed = answer.plan.as_ref().and_then(|plan| plan.prediction.as_ref());
    json!({
        "iterations_per_second": answer.iterations_per_s(),
        "iteration_seconds": prediction.iteration_s,
        "interval_seconds": prediction.fast_s.zip(prediction.slow_s).map(|(fast, slow)| [fast, slow]),
        "upper_bound": prediction.bound_s.map(|bound| 1.0 / bound),
        "gap": prediction.gap(),
        "limited_by": prediction.limited_by,
        "finished": prediction.finished,
        "search_seconds": search_seconds,
        "tokens_per_second": answer.tokens_per_s(),
        "mfu": answer.mfu(),
        "basis": answer.basis,
        "measure_first": answer.basis == Basis::Estimate,
        "executed_seconds": executed.map(|prediction| seconds(prediction.step_ns)),
        "rows": answer.rows(),
        "why": why,
        "plan": answer,
    })
}

/// Of a job's plan, which was measured and is executed as it is.
pub(super) fn of_job(planned: &Planned, search_seconds: f64) -> Value {
    let Planned { plan, explanation, .. } = planned;
    let step = seconds(explanation.step_ns);
    let proven = seconds(explanation.search.proven_ns);
    json!({
        "iterations_per_second": 1.0 / step,
        "iteration_seconds": step,
        "interval_seconds": null,
        "upper_bound": 1.0 / proven,
        "gap": (1.0 - proven / step).max(0.0),
        "limited_by": explanation.limited_by,
        "finished": explanation.search.finished,
        "search_seconds": search_seconds,
        "tokens_per_second": explanation.tokens_per_s,
        "mfu": null,
        "basis": Basis::Profile,
        "measure_first": false,
        "executed_seconds": step,
        "rows": rows(planned),
        "why": why(explanation),
        "plan": plan,
    })
}

/// A row a stage, each of one device.
fn rows(planned: &Planned) -> Vec<Value> {
    let Planned { plan, explanation, .. } = planned;
    let kind = |row: &hgct_planner::explain::StageRow| {
        explanation.devices.iter().find(|device| device.device == row.device).map(|device| &device.kind)
    };
    let pipelines = explanation.stages.chunk_by(|a, b| a.pipeline == b.pipeline);
    let rows = pipelines.flat_map(|stages| stages.iter().enumerate()).map(|(stage, row)| {
        json!({
            "template": row.pipeline,
            "pipelines": 1,
            "stage": stage,
            "kind": kind(row),
            "device": row.device,
            "layers": [row.first_layer, row.end_layer],
            "devices": 1,
            "tensor_parallel": 1,
            "expert_parallel": 1,
            "replicas": 1,
            "micro_batch": row.micro_batch,
            "micro_batches": row.num_micro_batches,
            "schedule": plan.pipelines.get(row.pipeline as usize).map(|of| &of.schedule),
            "recompute": row.recompute,
            "memory_bytes": row.memory_bytes,
            "memory_limit_bytes": row.memory_limit_bytes,
            "busy": part(row.busy_permille),
        })
    });
    rows.collect()
}

fn why(explanation: &Explanation) -> Value {
    let losses = explanation.losses;
    let lost = |ns: i64| ns as f64 / 1e9;
    let rejected: Vec<Value> = explanation
        .rejected
        .iter()
        .map(|row| {
            let rate = row.step_ns.map(|ns| 1.0 / seconds(ns));
            json!({ "name": row.name, "iterations_per_second": rate, "form": row.form })
        })
        .collect();
    let devices: Vec<Value> = explanation
        .devices
        .iter()
        .map(|row| {
            json!({
                "device": row.device,
                "kind": row.kind,
                "used": row.used,
                "needed": row.needed,
                "share": part(row.share_permille),
                "fair_share": part(row.fair_share_permille),
                "gain": row.gain_permille.map(part),
            })
        })
        .collect();
    json!({
        "compute_bound_seconds": seconds(explanation.bound_ns),
        "lost_seconds": {
            "rounding": lost(losses.rounding_ns),
            "memory": lost(losses.memory_ns),
            "bubble": lost(losses.bubble_ns),
            "exchange": lost(losses.exchange_ns),
        },
        "devices": devices,
        "rejected": rejected,
        "plans_simulated": explanation.search.simulated,
        "isolation": explanation.isolation,
    })
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn part(permille: i64) -> f64 {
    permille as f64 / 1e3
}
