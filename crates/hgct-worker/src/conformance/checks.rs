//! The checks themselves.

use std::time::{Duration, Instant};

use hgct_core::model::{ModelSpec, RopeScaling};

use crate::engine::{Edge, Engine, ImportRows, Lease};
use crate::memory::resident_bytes;
use crate::reference::ReferenceEngine;

use super::case::{Case, STAGE, normal, record, small_model, text, wait};
use super::compare::{Value, first_difference, largest_error};
use super::{Failure, Finding};

/// Largest error that passes, relative to each tensor's largest: f32 arithmetic against f64. What
/// is rounded to 11 bits of mantissa (TF32) is a hundred times off.
const TOLERANCE: f64 = 1e-5;

/// Growth of resident memory between step 5 and step 50 that passes.
const GROWTH_MIB: f64 = 2.0;

/// A named check.
pub(super) struct Check {
    pub(super) name: &'static str,
    pub(super) run: fn(&mut dyn Engine, Instant) -> Result<Finding, Failure>,
}

macro_rules! check {
    ($name:literal, $run:expr) => {
        Check { name: $name, run: $run }
    };
}

/// All checks; those that compile something new for no other come last.
pub(super) const CHECKS: &[Check] = &[
    check!("embedding", |engine, deadline| compare(engine, &Case::new(0..1), deadline)),
    check!("block", |engine, deadline| compare(engine, &Case::new(1..2), deadline)),
    check!("head", |engine, deadline| compare(engine, &Case::new(3..4), deadline)),
    check!("stage-of-all-layers", |engine, deadline| compare(engine, &Case::new(0..4), deadline)),
    check!("tied-head", |engine, deadline| compare(engine, &tied(Case::new(3..4)), deadline)),
    check!("tied-both-ends", |engine, deadline| compare(engine, &tied(Case::new(0..4)), deadline)),
    check!("rope-linear", |engine, deadline| {
        compare(engine, &scaled(RopeScaling::Linear { factor: 3.0 }), deadline)
    }),
    check!("rope-llama3", |engine, deadline| compare(engine, &scaled(LLAMA3), deadline)),
    check!("three-in-flight", |engine, deadline| {
        compare(engine, &Case { micro_batches: 3, ..Case::new(1..3) }, deadline)
    }),
    check!("drop", |engine, deadline| {
        compare(engine, &Case { micro_batches: 3, dropped: Some(1), ..Case::new(1..3) }, deadline)
    }),
    check!("abort", abort),
    check!("recompute", recompute),
    check!("evaluate-and-logits", evaluate),
    check!("export-import", export),
    check!("determinism", determinism),
    check!("load-again", load_again),
    check!("speed", |engine, deadline| speed(engine, deadline, &SPEED)),
    // The longest comes last, where it may use up the budget.
    check!("memory", memory),
];

/// Low, middle and high frequencies of the small model all occur.
const LLAMA3: RopeScaling = RopeScaling::Llama3 {
    factor: 8.0,
    low_freq_factor: 1.0,
    high_freq_factor: 4.0,
    original_max_position: 64,
};

fn tied(case: Case) -> Case {
    Case { model: ModelSpec { tie_embeddings: true, ..case.model }, ..case }
}

fn scaled(rope_scaling: RopeScaling) -> Case {
    Case { model: ModelSpec { rope_scaling, ..small_model() }, ..Case::new(1..2) }
}

/// Plays a case on the engine and on the reference.
fn compare(engine: &mut dyn Engine, case: &Case, deadline: Instant) -> Result<Finding, Failure> {
    let found = case.play(engine, deadline)?;
    against_reference(&found, case, deadline)
}

fn against_reference(found: &[Value], case: &Case, deadline: Instant) -> Result<Finding, Failure> {
    let expected = case.play(&mut ReferenceEngine::new(), deadline)?;
    let (error, place) = largest_error(found, &expected)?;
    Ok(Finding::measured(error, TOLERANCE, place))
}

/// Micro-batches that an abort left behind count no more, and their numbers are free again.
fn abort(engine: &mut dyn Engine, deadline: Instant) -> Result<Finding, Failure> {
    let case = Case::new(1..3);
    case.load(engine)?;
    for number in 0..2 {
        wait(engine.forward(STAGE, number, case.inputs(number + 7)), deadline)?;
    }
    engine.abort().map_err(text)?;
    if case.backward(engine, 1, None, deadline).is_ok() {
        return Ok(Finding::fail("backward of an aborted micro-batch was accepted".into()));
    }
    against_reference(&case.step(engine, deadline)?, &case, deadline)
}

fn recompute(engine: &mut dyn Engine, deadline: Instant) -> Result<Finding, Failure> {
    if !engine.describe().recompute {
        return Ok(Finding::skipped("the engine says that it cannot"));
    }
    compare(engine, &Case { recompute: true, micro_batches: 3, ..Case::new(1..3) }, deadline)
}

fn evaluate(engine: &mut dyn Engine, deadline: Instant) -> Result<Finding, Failure> {
    let case = Case::new(0..4);
    let answers = |engine: &mut dyn Engine| {
        case.load(engine)?;
        let mut found = Vec::new();
        record(&mut found, "evaluate", &wait(engine.evaluate(STAGE, case.inputs(0)), deadline)?)?;
        record(&mut found, "logits", &wait(engine.logits(STAGE, case.inputs_without_labels(0)), deadline)?)?;
        Ok::<_, Failure>(found)
    };
    let (found, expected) = (answers(engine)?, answers(&mut ReferenceEngine::new())?);
    let (error, place) = largest_error(&found, &expected)?;
    Ok(Finding::measured(error, TOLERANCE, place))
}

/// What was imported, whole or in rows, comes out with the same bits, the rarest values too.
fn export(engine: &mut dyn Engine, deadline: Instant) -> Result<Finding, Failure> {
    const RARE: [f32; 8] =
        [0.0, -0.0, f32::MIN_POSITIVE, -1e-42, f32::MAX, f32::MIN, f32::EPSILON, f32::INFINITY];
    let case = Case::new(0..4);
    case.load(engine)?;
    let tensors: Vec<_> = case.model.stage_tensors(case.layers.clone()).into_iter().map(|(_, t)| t).collect();
    let names: Vec<String> = tensors.iter().map(|tensor| tensor.name.clone()).collect();
    let mut rows = Vec::new();
    let mut expected = Vec::new();
    for tensor in &tensors {
        let mut values = normal(&format!("other {}", tensor.name), tensor.num_elements());
        values[..RARE.len()].copy_from_slice(&RARE);
        let cut = tensor.rows() / 3;
        for part in [0..cut, cut..tensor.rows()] {
            let width = tensor.row_elements();
            let elements = (part.start * width) as usize..(part.end * width) as usize;
            let shape = [&[part.end - part.start], &tensor.shape[1..]].concat();
            let lease = Lease::of_f32(&tensor.name, shape, values[elements].to_vec());
            rows.push(ImportRows { lease, first_row: part.start });
        }
        expected.push(Lease::of_f32(&tensor.name, tensor.shape.clone(), values));
    }
    engine.import(STAGE, &rows).map_err(text)?;
    drop(rows);
    let found = engine.export(STAGE, &names).map_err(text)?;
    let values = |leases: Vec<Lease>| {
        let mut values = Vec::new();
        record(&mut values, "exported", &Edge::new(leases)).map(|()| values)
    };
    let difference = first_difference(&values(found)?, &values(expected)?)?.map(str::to_owned);
    if Instant::now() > deadline {
        return Err("took longer than its share of the budget".into());
    }
    Ok(difference.map_or_else(
        || Finding::pass(format!("{} tensors bit for bit", tensors.len())),
        |label| Finding::fail(format!("{label} has other bits than were imported")),
    ))
}

/// The same step twice without loading between: also shows that gradients are set to zero.
fn determinism(engine: &mut dyn Engine, deadline: Instant) -> Result<Finding, Failure> {
    let case = Case { micro_batches: 3, ..Case::new(0..4) };
    case.load(engine)?;
    let (first, second) = (case.step(engine, deadline)?, case.step(engine, deadline)?);
    let (error, place) = largest_error(&second, &first)?;
    if error > TOLERANCE {
        return Ok(Finding::measured(error, TOLERANCE, format!("the second step differs, {place}")));
    }
    Ok(match first_difference(&second, &first)? {
        None => Finding::pass("the same bits twice".into()),
        Some(_) if !engine.describe().deterministic => {
            Finding::skipped("the engine does not promise the same bits")
        }
        Some(label) => Finding::fail(format!("{label} has other bits the second time ({error:.1e})")),
    })
}

/// Another stage in the same process, with micro-batches of the stage before left in flight.
fn load_again(engine: &mut dyn Engine, deadline: Instant) -> Result<Finding, Failure> {
    let before = Case { micro_batches: 2, ..Case::new(0..3) };
    before.load(engine)?;
    for number in 0..2 {
        wait(engine.forward(STAGE, number, before.inputs(number)), deadline)?;
    }
    let after = Case { micro_batches: 2, ..Case::new(2..4) };
    let found = after.play(engine, deadline)?;
    let finding = against_reference(&found, &after, deadline)?;
    engine.load(&[]).map_err(text)?;
    if engine.forward(STAGE, 0, after.inputs(0)).is_ok() {
        return Ok(Finding::fail("a stage that is no longer loaded was accepted".into()));
    }
    Ok(finding)
}

/// Resident memory from step 5 to step 50, each with three micro-batches in flight, an export and
/// an import.
fn memory(engine: &mut dyn Engine, deadline: Instant) -> Result<Finding, Failure> {
    const MIB: f64 = (1 << 20) as f64;
    if resident_bytes() == 0 {
        return Ok(Finding::skipped("this system does not tell a process's resident memory"));
    }
    let case = Case { micro_batches: 3, ..Case::new(1..2) };
    case.load(engine)?;
    let names: Vec<String> = case.parameters().iter().map(|rows| rows.lease.name.clone()).collect();
    let mut at_step = Vec::with_capacity(50);
    for _ in 0..50 {
        case.step(engine, deadline)?;
        let exported = engine.export(STAGE, &names).map_err(text)?;
        drop(exported);
        engine.import(STAGE, &case.parameters()).map_err(text)?;
        at_step.push(resident_bytes());
    }
    // A page more or less at one step says nothing: the least of five steps at either end.
    let least = |steps: &[u64]| steps.iter().copied().min().unwrap_or(0) as f64 / MIB;
    let (before, after) = (least(&at_step[4..9]), least(&at_step[45..]));
    let message = format!("growth in MiB: {before:.1} resident at step 5, {after:.1} at step 50");
    Ok(Finding::measured((after - before).max(0.0), GROWTH_MIB, message))
}

/// Shape of the block that is timed.
pub(super) struct SpeedShape {
    pub(super) hidden_size: u32,
    pub(super) intermediate_size: u32,
    pub(super) num_heads: u32,
    pub(super) seq_len: u64,
}

/// A block as small models have it, with as many key as query heads, which no other check has.
const SPEED: SpeedShape = SpeedShape { hidden_size: 256, intermediate_size: 896, num_heads: 4, seq_len: 256 };

/// Times one block, forward and backward apart, after a first run that is compared.
pub(super) fn speed(
    engine: &mut dyn Engine,
    deadline: Instant,
    shape: &SpeedShape,
) -> Result<Finding, Failure> {
    let SpeedShape { hidden_size, intermediate_size, num_heads, seq_len } = *shape;
    let head_dim = hidden_size / num_heads;
    let num_kv_heads = num_heads;
    // Activations of about the size that they have in the small model.
    let initializer_range = 1.0 / f64::from(hidden_size).sqrt();
    let model = ModelSpec {
        hidden_size,
        intermediate_size,
        num_heads,
        num_kv_heads,
        head_dim,
        initializer_range,
        ..small_model()
    };
    let case = Case { model, samples: 1, seq_len, ..Case::new(1..2) };
    let compared = compare(engine, &case, deadline)?;
    let rates = time(engine, &case, deadline)?;
    Ok(Finding { message: format!("{rates}; {}", compared.message), ..compared })
}

/// Tokens a second of a loaded block.
fn time(engine: &mut dyn Engine, case: &Case, deadline: Instant) -> Result<String, Failure> {
    let (mut forward, mut backward, mut count) = (Duration::ZERO, Duration::ZERO, 0);
    // The first pair warms up.
    for round in 0..=40 {
        let inputs = case.inputs(0);
        let start = Instant::now();
        wait(engine.forward(STAGE, 0, inputs), deadline)?;
        let middle = Instant::now();
        case.backward(engine, 0, None, deadline)?;
        if round > 0 {
            forward += middle - start;
            backward += middle.elapsed();
            count += 1;
        }
        if forward + backward > Duration::from_secs(1) {
            break;
        }
    }
    let rate = |time: Duration| (case.seq_len * count) as f64 / time.as_secs_f64();
    let width = case.model.hidden_size;
    Ok(format!("width {width}: forward {:.0}, backward {:.0} tokens/s", rate(forward), rate(backward)))
}
