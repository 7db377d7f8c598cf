//! A planning problem from documents: cluster, model, and a catalogue or a profile.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use hgct_core::accelerator::Confidence;
use hgct_core::architecture::Architecture;
use hgct_core::canonical;
use hgct_core::cluster::ClusterSpec;
use hgct_core::dtype::DType;
use hgct_core::model::ModelSpec;
use hgct_core::profile::Profile;
use hgct_core::topology::{ResolvedGroup, Topology};
use hgct_planner::MeasuredInput;
use hgct_planner::answer::{Basis, ModelFacts, check_batch};
use hgct_planner::estimate::{Case, Precision, Workload, estimate, measured, mixed};
use hgct_planner::instance::{Instance, Rules};

use super::Large;
use crate::catalogue;

/// Sequence length where none is given, if the model allows it.
const SEQ_LEN: u32 = 4096;

/// A problem, and the same at both ends of what is known.
pub(super) struct Problem {
    pub(super) instance: Instance,
    pub(super) slow: Option<Instance>,
    pub(super) fast: Option<Instance>,
    pub(super) basis: Basis,
    pub(super) model: ModelFacts,
    pub(super) peaks: Vec<f64>,
    pub(super) confidence: Vec<Confidence>,
    /// What it was made from, where devices were measured.
    pub(super) measured: Option<Documents>,
}

/// What is known of devices that were measured.
pub(super) struct Documents {
    model: ModelSpec,
    cluster: ClusterSpec,
    profile: Profile,
}

impl Documents {
    pub(super) fn input(&self) -> MeasuredInput<'_> {
        MeasuredInput { model: &self.model, cluster: &self.cluster, profile: &self.profile }
    }
}

impl Problem {
    /// Reads all documents.
    pub(super) fn read(args: &Large, cluster: &Path, model: &Path, profile: Option<&Path>) -> Result<Self> {
        let (file, text) = (model.to_string_lossy(), read(model)?);
        let architecture = Architecture::from_config_json(&file, &text)?;
        if args.global_batch == Some(0) {
            bail!("--global-batch is 0, but must be at least 1");
        }
        let global_batch = args.global_batch.unwrap_or(1);
        let (cluster_file, cluster_text) = (cluster.to_string_lossy(), read(cluster)?);
        let discovered = is_discovered(&cluster_file, &cluster_text)?;
        let mut problem = match (discovered, profile) {
            (true, Some(profile)) => {
                let model = ModelSpec::from_config_json(&file, &text)?;
                let cluster = ClusterSpec::from_toml(&cluster_file, &cluster_text)?;
                let profile: Profile = canonical::decode(&profile.to_string_lossy(), &read(profile)?)?;
                from_profile(&architecture, Documents { model, cluster, profile }, global_batch)?
            }
            (false, None) => {
                let topology = Topology::from_toml(&cluster_file, &cluster_text)?;
                from_catalogue(args, &cluster_file, &topology, &architecture, global_batch)?
            }
            (true, None) => bail!(
                "{cluster_file} lists devices that were found; with --model it needs --profile FILE. To measure \
                 and plan in one go: hgct plan job.toml. To plan without devices, list groups: docs/planning.md"
            ),
            (false, Some(_)) => bail!(
                "{cluster_file} lists groups of nodes, and a profile is of single devices: leave --profile out, or \
                 give the cluster that it was measured on"
            ),
        };
        problem.keep_sizes(&args.micro_batches)?;
        check_batch(&problem.instance)?;
        Ok(problem)
    }

    /// Takes the nodes of two kinds, `A+B`, together in pairs: [`mixed`].
    pub(super) fn mix(&mut self, kinds: &str) -> Result<()> {
        let pools = &self.instance.pools;
        let known: Vec<String> = pools.iter().map(|pool| pool.kind.clone()).collect();
        let find = |kind: &str| known.iter().position(|known| known == kind);
        let pair = kinds.split_once('+').and_then(|(a, b)| Some((find(a)?, find(b)?)));
        let mix = |instance: &Instance| pair.and_then(|(a, b)| mixed(instance, a, b));
        let Some(instance) = mix(&self.instance) else {
            bail!(
                "--mixed-tensor-parallel is {kinds}, but must be two unlike kinds with a degree in common: A+B of \
                 {}",
                known.join(", ")
            );
        };
        self.instance = instance;
        (self.slow, self.fast) = (self.slow.as_ref().and_then(mix), self.fast.as_ref().and_then(mix));
        if let Some((a, b)) = pair {
            if let (Some(peak_a), Some(peak_b)) = (self.peaks.get(a), self.peaks.get(b)) {
                self.peaks.push(f64::midpoint(*peak_a, *peak_b));
            }
            let worse = self.confidence.get(a).zip(self.confidence.get(b)).map(|(a, b)| *a.min(b));
            self.confidence.extend(worse);
        }
        Ok(())
    }

    /// Leaves only micro-batches of these sizes.
    pub(super) fn keep_sizes(&mut self, sizes: &[u32]) -> Result<()> {
        if sizes.is_empty() {
            return Ok(());
        }
        for instance in
            [Some(&mut self.instance), self.slow.as_mut(), self.fast.as_mut()].into_iter().flatten()
        {
            let known: Vec<u32> = instance.pools[0].costs.iter().map(|cost| cost.micro_batch).collect();
            if let Some(unknown) = sizes.iter().find(|size| !known.contains(size)) {
                let mut known = known;
                known.sort_unstable();
                known.dedup();
                bail!("--micro-batches has {unknown}, but must be among {known:?}");
            }
            for pool in &mut instance.pools {
                pool.costs.retain(|cost| sizes.contains(&cost.micro_batch));
            }
        }
        Ok(())
    }
}

fn from_catalogue(
    args: &Large,
    file: &str,
    topology: &Topology,
    architecture: &Architecture,
    global_batch: u32,
) -> Result<Problem> {
    let catalogue = catalogue::load(args.accelerators.as_deref())?;
    let groups = topology.resolve(file, &catalogue)?;
    let seq_len = args.seq_len.unwrap_or(SEQ_LEN.min(architecture.max_position));
    if seq_len == 0 || seq_len > 1 << 24 {
        bail!("--seq-len is {seq_len}, but must be from 1 to {}", 1 << 24);
    }
    let precision = Precision::of(args.precision);
    let workload = Workload { architecture, seq_len, global_batch, precision };
    let mut rules = Rules::hierarchical();
    if !args.schedules.is_empty() {
        rules.schedules.clone_from(&args.schedules);
    }
    let of = |case| estimate(topology, &groups, &workload, rules.clone(), case);
    let peak = |group: &ResolvedGroup<'_>| {
        group.accelerator.peak_flops_per_s.get(&args.precision).map_or(0.0, |figure| figure.value)
    };
    Ok(Problem {
        instance: of(Case::Expected)?,
        slow: Some(of(Case::Slow)?),
        fast: Some(of(Case::Fast)?),
        basis: Basis::Estimate,
        model: ModelFacts::new(architecture, seq_len),
        peaks: groups.iter().map(peak).collect(),
        confidence: groups.iter().map(|group| group.confidence).collect(),
        measured: None,
    })
}

fn from_profile(architecture: &Architecture, documents: Documents, global_batch: u32) -> Result<Problem> {
    let Documents { model, cluster, profile } = &documents;
    Ok(Problem {
        instance: measured(cluster, profile, model, global_batch, Rules::executable())?,
        slow: None,
        fast: None,
        basis: Basis::Profile,
        model: ModelFacts::new(architecture, profile.seq_len),
        peaks: Vec::new(),
        confidence: Vec::new(),
        measured: Some(documents),
    })
}

/// Whether a cluster document lists devices that were found, rather than groups of nodes.
fn is_discovered(file: &str, text: &str) -> Result<bool> {
    let table: toml::Table = hgct_core::suggest::parse_toml(file, text)?;
    match (table.contains_key("node"), table.contains_key("group")) {
        (true, true) => {
            bail!("{file} has both [[node]] and [[group]]: keep devices that were found and groups apart")
        }
        (found, _) => Ok(found),
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", PathBuf::from(path).display()))
}

/// A dtype of arithmetic, from the command line.
pub(super) fn precision(text: &str) -> Result<DType, String> {
    match text {
        "bf16" => Ok(DType::Bf16),
        "f16" | "fp16" => Ok(DType::F16),
        "f32" | "fp32" => Ok(DType::F32),
        _ => Err("must be bf16, f16 or f32".into()),
    }
}
