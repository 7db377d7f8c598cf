//! A planning problem from tables of layer times.

use std::path::Path;

use anyhow::Result;
use hgct_planner::answer::{Basis, ModelFacts, check_batch};
use hgct_planner::tables::parse_device_counts;

use super::Large;
use super::problem::Problem;

impl Problem {
    /// The problem of `hgct plan --tables DIR --devices KIND=COUNT,… --model NAME`.
    pub(super) fn from_tables(args: &Large, dir: &Path, devices: &str, model: &Path) -> Result<Self> {
        let model = &*model.to_string_lossy();
        let tables = crate::validate::read_tables(dir)?;
        let instance =
            tables.instance(model, &parse_device_counts(devices)?, args.global_batch.unwrap_or(0))?;
        let parameters: f64 = tables.model(model)?.floats(1)?.iter().map(|layer| layer.parameters).sum();
        let mut problem = Self {
            instance,
            slow: None,
            fast: None,
            basis: Basis::Tables,
            model: ModelFacts {
                family: model.to_owned(),
                parameters: parameters.round() as u64,
                active_parameters: parameters.round() as u64,
                train_flops: 0.0,
                tied_embeddings: None,
            },
            peaks: Vec::new(),
            confidence: Vec::new(),
            measured: None,
        };
        problem.keep_sizes(&args.micro_batches)?;
        check_batch(&problem.instance)?;
        Ok(problem)
    }
}
