//! The one error type of this crate.

use hgct_core::ids::{DeviceId, NodeId};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why there is no plan. All of these are the input's fault (exit code 2).
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
#[non_exhaustive]
pub enum Error {
    /// No device may be used.
    #[error("no device to plan for: {reason}")]
    NoDevices {
        /// Why there is none, and what to do.
        reason: String,
    },
    /// The policy names a device that the cluster lacks.
    #[error("`policy.devices` names {device}, which the cluster does not have (it has: {known})")]
    UnknownDevice {
        /// The device.
        device: DeviceId,
        /// The cluster's devices.
        known: String,
    },
    /// A device was not measured.
    #[error(
        "the profile has no row of {device}{detail}; run `hgct profile`, or leave it out by `policy.devices`"
    )]
    NotMeasured {
        /// The device.
        device: DeviceId,
        /// What exactly is missing.
        detail: String,
    },
    /// The profile is of something else.
    #[error("the profile has {what} {found}, but the job {expected}; run `hgct profile` again")]
    OtherProfile {
        /// Which field.
        what: &'static str,
        /// In the profile.
        found: String,
        /// In the job.
        expected: String,
    },
    /// Two devices have no link between them.
    #[error("the profile has no link from {from} to {to}; run `hgct profile` with both")]
    NoLink {
        /// Sender.
        from: DeviceId,
        /// Receiver.
        to: DeviceId,
    },
    /// The model does not fit, however it is cut.
    #[error(
        "the model fits nowhere: the best try needs {needed_bytes} bytes on {device}, which has {limit_bytes}: \
         {missing_bytes} are missing; give it more memory in its grant, use smaller micro-batches, or add devices"
    )]
    DoesNotFit {
        /// Where the least is missing.
        device: DeviceId,
        /// Bytes that it would need.
        needed_bytes: u64,
        /// Bytes that it has.
        limit_bytes: u64,
        /// The difference.
        missing_bytes: u64,
    },
    /// The devices of a node need more than the node has.
    #[error("the model does not fit on node {node}: {needed_bytes} bytes needed, {limit_bytes} there")]
    NodeFull {
        /// The node.
        node: NodeId,
        /// Bytes that its devices would need.
        needed_bytes: u64,
        /// Bytes that it has.
        limit_bytes: u64,
    },
    /// No number of micro-batches gives the global batch.
    #[error(
        "`recipe.global_batch` is {global_batch}, which no sum of micro-batches of {sizes:?} samples gives\
         {limit}; nearest that work: {nearest}"
    )]
    Batch {
        /// Samples a step.
        global_batch: u32,
        /// Micro-batch sizes that may be used.
        sizes: Vec<u32>,
        /// A limit that matters, in words; may be empty.
        limit: String,
        /// Nearest batches that work.
        nearest: String,
    },
    /// None of the policy's micro-batch sizes was measured on a device.
    #[error(
        "`policy.micro_batches` allows {wanted:?}, but {device} was measured with {measured:?} only: allow one of these, or leave the device out with `policy.devices`"
    )]
    MicroBatch {
        /// The device.
        device: DeviceId,
        /// The policy's sizes.
        wanted: Vec<u32>,
        /// What the profile has.
        measured: Vec<u32>,
    },
    /// The policy asks for more kinds than can take part.
    #[error("`policy.min_kinds` is {wanted}, but {reason}")]
    MinKinds {
        /// What is asked for.
        wanted: u32,
        /// Why that cannot be.
        reason: String,
    },
    /// The policy's shape allows no plan.
    #[error("`policy.shape` allows no plan: {reason}")]
    Shape {
        /// Why.
        reason: String,
    },
    /// No sum of micro-batches gives the global batch.
    #[error(
        "the global batch is {global_batch}, which no sum of micro-batches of {sizes:?} samples gives; nearest \
         that work: {nearest}"
    )]
    GlobalBatch {
        /// Samples a step.
        global_batch: u32,
        /// Micro-batch sizes that may be used.
        sizes: Vec<u32>,
        /// Nearest batches that work.
        nearest: String,
    },
    /// The catalogue does not know how fast a card is in a dtype.
    #[error(
        "group {group}: the catalogue knows no rate of {kind} in {dtype} (it knows: {known}); choose another \
         --precision, or add the figure to the accelerator's file"
    )]
    NoRate {
        /// The accelerator.
        kind: String,
        /// The group of nodes.
        group: String,
        /// The dtype of arithmetic.
        dtype: &'static str,
        /// Dtypes whose rate is known.
        known: String,
    },
    /// The search was ended before it had any plan.
    #[error("the search was ended before it had a plan; give it a larger budget")]
    Budget,
    /// Tables lack something that was asked of them.
    #[error("the tables have no {what} {found} (they have: {known})")]
    Tables {
        /// What was looked for.
        what: &'static str,
        /// Its name.
        found: String,
        /// What there is.
        known: String,
    },
    /// A layout is none, or too large to simulate.
    #[error("layout: {fault}")]
    Layout {
        /// What is wrong, and where.
        fault: String,
    },
    /// The pipelines that a loss leaves need more memory than there is: fewer share optimizer state.
    #[error(
        "without {lost} the pipelines that are left do not fit: {device} would need {needed_bytes} bytes and has \
         {limit_bytes}: {missing_bytes} are missing; see what else can be done with `hgct plan --parent`"
    )]
    LossDoesNotFit {
        /// The nodes that are lost.
        lost: String,
        /// Where the most is missing.
        device: String,
        /// Bytes that it would need.
        needed_bytes: u64,
        /// Bytes that it has.
        limit_bytes: u64,
        /// The difference.
        missing_bytes: u64,
    },
    /// The program that shall execute a plan has no word for it.
    #[error("{target} cannot express this plan: {reason}")]
    Export {
        /// The program.
        target: &'static str,
        /// What it lacks, with what the plan has.
        reason: String,
    },
    /// A document breaks its own rules.
    #[error(transparent)]
    Core(#[from] hgct_core::Error),
}
