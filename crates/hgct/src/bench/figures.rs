//! Medians, spreads, and the documents of the training benchmark.

use hgct_core::ids::Kind;
use hgct_core::plan::Plan;
use serde::Serialize;

/// Median and spread of repeated measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Figure {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Figure {
    /// Of at least one value.
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            values[middle - 1].midpoint(values[middle])
        } else {
            values[middle]
        };
        Some(Self { median, min, max })
    }
}

/// `hgct bench training --json`
#[derive(Debug, Serialize)]
pub(super) struct TrainingBench {
    /// When.
    pub(super) measured_at: String,
    /// The command that gives it again.
    pub(super) command: String,
    /// Processor.
    pub(super) machine: String,
    /// Tokens a second together ÷ sum of the kinds side by side, of the planner's choice.
    pub(super) efficiency: f64,
    /// The same against the kinds one after another.
    pub(super) efficiency_one_after_another: Option<f64>,
    /// Largest |predicted − measured| ÷ measured step time of the rows.
    pub(super) prediction_error: f64,
    /// 1 − hgct ÷ plain PyTorch, tokens a second.
    pub(super) worker_overhead: Option<f64>,
    /// Forced pipeline: dry run with the medians measured alone and free communication ÷ measured.
    pub(super) pipeline_of_dry_run: Option<f64>,
    /// Rounds that count.
    pub(super) rounds: usize,
    /// Rounds in which a kind's CPU share was off.
    pub(super) void_rounds: usize,
    /// One row a plan.
    pub(super) plans: Vec<PlanRow>,
    /// One row a plan and kind.
    pub(super) rows: Vec<KindRow>,
}

/// One plan.
#[derive(Debug, Serialize)]
pub(super) struct PlanRow {
    pub(super) plan: String,
    pub(super) tokens_per_second: Figure,
    pub(super) efficiency: Figure,
    pub(super) step_seconds: Figure,
    pub(super) predicted_step_seconds: f64,
    pub(super) prediction_error: f64,
    /// Shares of the step by which it falls short of the summed speed.
    pub(super) losses: Losses,
}

/// Where the rest went, shares of the step.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Losses {
    /// Micro-batches and layers are whole.
    pub(super) rounding: f64,
    /// Reduce, update and gather, beyond what training alone pays too.
    pub(super) exchange: f64,
    /// Gaps of the busiest rank.
    pub(super) waiting: f64,
    /// What is left.
    pub(super) unexplained: f64,
}

/// One kind under one plan.
#[derive(Debug, Serialize)]
pub(super) struct KindRow {
    pub(super) plan: String,
    pub(super) kind: Kind,
    pub(super) tokens_per_second_alone: f64,
    pub(super) tokens_per_second_together: f64,
    pub(super) of_its_own: f64,
    pub(super) cpu_quota: f64,
    /// CPU time ÷ wall time of its compute actions ÷ quota, median.
    pub(super) cpu_share_of_quota: f64,
}

impl std::fmt::Display for TrainingBench {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} · {} · {} rounds, {} void",
            self.measured_at, self.machine, self.rounds, self.void_rounds
        )?;
        writeln!(
            f,
            "\n{:<18} {:>10} {:>22} {:>10} {:>10} {:>7}   rounding exchange waiting unexplained",
            "plan", "tokens/s", "efficiency (min–max)", "step s", "predicted", "error"
        )?;
        for row in &self.plans {
            let l = row.losses;
            writeln!(
                f,
                "{:<18} {:>10.0} {:>8.1} % ({:.1}–{:.1}) {:>10.3} {:>10.3} {:>5.1} %   {:>6.1} % {:>6.1} % {:>5.1} % {:>9.1} %",
                row.plan,
                row.tokens_per_second.median,
                100.0 * row.efficiency.median,
                100.0 * row.efficiency.min,
                100.0 * row.efficiency.max,
                row.step_seconds.median,
                row.predicted_step_seconds,
                100.0 * row.prediction_error,
                100.0 * l.rounding,
                100.0 * l.exchange,
                100.0 * l.waiting,
                100.0 * l.unexplained,
            )?;
        }
        writeln!(
            f,
            "\n{:<18} {:<28} {:>9} {:>10} {:>9} {:>6} {:>10}",
            "plan", "kind", "alone", "together", "of its own", "quota", "CPU share"
        )?;
        for row in &self.rows {
            writeln!(
                f,
                "{:<18} {:<28} {:>9.0} {:>10.0} {:>8.1} % {:>6.2} {:>8.1} %",
                row.plan,
                row.kind,
                row.tokens_per_second_alone,
                row.tokens_per_second_together,
                100.0 * row.of_its_own,
                row.cpu_quota,
                100.0 * row.cpu_share_of_quota
            )?;
        }
        writeln!(
            f,
            "\nefficiency of the planner's choice: {:.1} % of the kinds side by side",
            100.0 * self.efficiency
        )?;
        if let Some(share) = self.efficiency_one_after_another {
            writeln!(f, "the same against one after another: {:.1} %", 100.0 * share)?;
        }
        writeln!(f, "largest error of a predicted step: {:.1} %", 100.0 * self.prediction_error)?;
        if let Some(share) = self.pipeline_of_dry_run {
            writeln!(f, "forced pipeline: {:.1} % of its dry run with free communication", 100.0 * share)?;
        }
        if let Some(overhead) = self.worker_overhead {
            writeln!(
                f,
                "a torch worker under hgct: {:.1} % of a plain PyTorch loop",
                100.0 * (1.0 - overhead)
            )?;
        }
        write!(f, "again: {}", self.command)
    }
}

/// The share of a step's model flops that each rank computes.
pub(super) fn flop_shares(plan: &Plan) -> Vec<f64> {
    let mut flops = vec![0.0; plan.ranks.len()];
    for pipeline in &plan.pipelines {
        for stage in &pipeline.stages {
            let stage = plan.stage(*stage);
            flops[stage.rank().index()] +=
                pipeline.num_samples() as f64 * plan.model.train_flops(stage.layers(), plan.seq_len);
        }
    }
    let sum: f64 = flops.iter().sum();
    flops.into_iter().map(|part| part / sum).collect()
}
