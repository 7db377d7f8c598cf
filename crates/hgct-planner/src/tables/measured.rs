//! Plans that were really run, and what they took.

use hgct_core::Error;

use super::cursor::{self, Cursor};
use super::{MOST, Tables};
use crate::Result;

/// A plan over layers that [`Tables`] knows (`measured_mixed.jsonl`).
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredLayers {
    /// Its name.
    pub id: String,
    /// The model's name.
    pub model: String,
    /// Samples a micro-batch.
    pub micro_batch: u32,
    /// Samples a step.
    pub global_batch: u32,
    /// Stages from the embedding to the head.
    pub stages: Vec<MeasuredStage>,
    /// Seconds a step.
    pub iteration_s: f64,
    /// Peak of the fullest device.
    pub peak_bytes: f64,
}

/// A stage of a measured plan.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredStage {
    /// First layer.
    pub first_layer: u32,
    /// Layer past the last.
    pub end_layer: u32,
    /// A group of devices for each pipeline, in order.
    pub replicas: Vec<MeasuredReplica>,
}

/// A group of devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeasuredReplica {
    /// Their kind.
    pub kind: String,
    /// How many.
    pub tensor_parallel: u32,
}

impl MeasuredLayers {
    /// Pipelines.
    pub fn num_pipelines(&self) -> u32 {
        self.stages.first().map_or(0, |stage| stage.replicas.len() as u32)
    }

    /// Micro-batches of each pipeline.
    pub fn num_micro_batches(&self) -> u32 {
        self.global_batch / (self.micro_batch * self.num_pipelines()).max(1)
    }
}

/// A plan of a GPT on alike accelerators, by its sizes (`measured_a100.csv`): 1F1B, every block
/// recomputed, two-byte activations.
#[derive(Debug, Clone, PartialEq)]
pub struct MeasuredTransformer {
    /// A name made of its sizes.
    pub id: String,
    /// Samples a step.
    pub global_batch: u32,
    /// Samples a micro-batch.
    pub micro_batch: u32,
    /// Width.
    pub hidden: u32,
    /// Attention heads.
    pub heads: u32,
    /// Blocks.
    pub blocks: u32,
    /// Tokens a sample.
    pub seq_len: u32,
    /// Devices that divide each layer.
    pub tensor_parallel: u32,
    /// Pipelines.
    pub data_parallel: u32,
    /// Stages.
    pub pipeline_parallel: u32,
    /// Seconds a step.
    pub iteration_s: f64,
}

/// Parses `measured_mixed.jsonl`; every plan must be one of the tables' layers.
pub fn parse_measured_layers(file: &str, text: &str, tables: &Tables) -> Result<Vec<MeasuredLayers>> {
    let mut rows = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("{file}, line {}", number + 1);
        let value = cursor::parse(&place, line)?;
        rows.push(measured_layers(&Cursor::root(&place, &value), tables)?);
        if rows.len() > MOST {
            return Err(
                Cursor::root(&place, &value).error(format!("row {}", rows.len()), format!("{MOST} rows"))
            );
        }
    }
    Ok(rows)
}

fn measured_layers(at: &Cursor<'_>, tables: &Tables) -> Result<MeasuredLayers> {
    let name = at.get("model")?;
    let model = tables.model(name.text()?)?;
    let mut stages: Vec<MeasuredStage> = Vec::new();
    for row in at.get("stages")?.items(MOST)? {
        let range = row.get("layers")?;
        let [first, last] = range.numbers::<2>()?;
        let expected = stages.last().map_or(0, |stage| stage.end_layer);
        if first.to_bits() != f64::from(expected).to_bits()
            || last.fract() > 0.0
            || !(first..f64::from(model.num_layers)).contains(&last)
        {
            let allowed = format!("[{expected}, up to {}]", model.num_layers - 1);
            return Err(range.error(format!("[{first}, {last}]"), allowed));
        }
        let mut replicas = Vec::new();
        for of in row.get("replicas")?.items(MOST)? {
            let count = of.get("count")?.count(1)? as usize;
            if replicas.len() + count > MOST {
                return Err(of.error(format!("{count} more replicas"), format!("at most {MOST} in all")));
            }
            let kind = of.get("gpu")?.text()?.to_owned();
            let tensor_parallel = of.get("tp")?.count(1)?;
            replicas.extend(vec![MeasuredReplica { kind, tensor_parallel }; count]);
        }
        if replicas.is_empty() || stages.first().is_some_and(|stage| stage.replicas.len() != replicas.len()) {
            return Err(row.error(
                format!("{} replicas", replicas.len()),
                "as many replicas in every stage, at least one",
            ));
        }
        stages.push(MeasuredStage { first_layer: first as u32, end_layer: last as u32 + 1, replicas });
    }
    if stages.last().map(|stage| stage.end_layer) != Some(model.num_layers) {
        return Err(at
            .get("stages")?
            .error("not all layers", format!("layers 0 to {}", model.num_layers - 1)));
    }
    let row = MeasuredLayers {
        id: at.get("id")?.text()?.to_owned(),
        model: name.text()?.to_owned(),
        micro_batch: at.get("micro_batch")?.count(1)?,
        global_batch: at.get("global_batch")?.count(1)?,
        stages,
        iteration_s: at.get("iteration_s")?.amount()?,
        peak_bytes: at.get("max_memory_bytes")?.amount()?,
    };
    let samples = u64::from(row.micro_batch) * u64::from(row.num_pipelines());
    if !u64::from(row.global_batch).is_multiple_of(samples) {
        let allowed = format!("a multiple of {samples}, what all pipelines take at once");
        return Err(at.get("global_batch")?.error(row.global_batch.to_string(), allowed));
    }
    Ok(row)
}

/// Columns of `measured_a100.csv` that are read, in the order of their use.
const COLUMNS: [&str; 10] = [
    "global batch",
    "micro batch",
    "hidden size",
    "attention heads",
    "# layers",
    "sequence length",
    "tensor parallelism",
    "data parallelism",
    "pipeline parallelism",
    "iteration time (ms)",
];

/// Parses `measured_a100.csv`, whose first line names the columns.
pub fn parse_measured_transformers(file: &str, text: &str) -> Result<Vec<MeasuredTransformer>> {
    let syntax = |line: usize, message: String| {
        crate::Error::Core(Error::Syntax { file: file.into(), line: Some(line), message })
    };
    let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let header: Vec<String> =
        lines.next().map_or("", |(_, line)| line).split(',').map(|name| name.trim().to_lowercase()).collect();
    let mut places = [0; COLUMNS.len()];
    for (place, column) in places.iter_mut().zip(COLUMNS) {
        *place = header
            .iter()
            .position(|name| name == column)
            .ok_or_else(|| syntax(1, format!("no column `{column}` (there are: {})", header.join(", "))))?;
    }
    let mut rows = Vec::new();
    for (number, line) in lines {
        let fields: Vec<&str> = line.split(',').map(str::trim).collect();
        let field = |at: usize| {
            fields
                .get(places[at])
                .and_then(|text| text.parse::<f64>().ok())
                .filter(|x| *x > 0.0 && *x < 1e9)
                .ok_or_else(|| syntax(number + 1, format!("`{}` is no positive number", COLUMNS[at])))
        };
        let whole = |at: usize| {
            let x = field(at)?;
            if x.fract() != 0.0 {
                return Err(syntax(number + 1, format!("`{}` is {x}, but must be whole", COLUMNS[at])));
            }
            Ok(x as u32)
        };
        let mut row = MeasuredTransformer {
            id: String::new(),
            global_batch: whole(0)?,
            micro_batch: whole(1)?,
            hidden: whole(2)?,
            heads: whole(3)?,
            blocks: whole(4)?,
            seq_len: whole(5)?,
            tensor_parallel: whole(6)?,
            data_parallel: whole(7)?,
            pipeline_parallel: whole(8)?,
            iteration_s: field(9)? / 1e3,
        };
        row.id = format!(
            "gpt-h{}-l{}/t{}-d{}-p{}-b{}",
            row.hidden,
            row.blocks,
            row.tensor_parallel,
            row.data_parallel,
            row.pipeline_parallel,
            row.micro_batch
        );
        let at_once = u64::from(row.micro_batch) * u64::from(row.data_parallel);
        if !u64::from(row.global_batch).is_multiple_of(at_once)
            || !row.blocks.is_multiple_of(row.pipeline_parallel)
        {
            return Err(syntax(
                number + 1,
                format!(
                    "a batch of {} is no multiple of {at_once}, or {} blocks none of {} stages",
                    row.global_batch, row.blocks, row.pipeline_parallel
                ),
            ));
        }
        if rows.len() == MOST {
            return Err(syntax(number + 1, format!("more than {MOST} rows")));
        }
        rows.push(row);
    }
    Ok(rows)
}
