//! What a row says: values with their spread, and the targets they are held against.

use std::collections::BTreeMap;

use bench_work::protocol::Done;
use serde::{Deserialize, Serialize};

use crate::contender::{Contender, Samples};

/// The middle of several samples, and the quartiles around it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Spread {
    pub low: f64,
    pub median: f64,
    pub high: f64,
    pub samples: usize,
}

impl Spread {
    pub fn of(mut samples: Vec<f64>) -> Option<Self> {
        samples.retain(|sample| sample.is_finite());
        samples.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = share * (samples.len() as f64 - 1.0);
            let (below, above) = (samples.get(place.floor() as usize)?, samples.get(place.ceil() as usize)?);
            Some(below + (above - below) * place.fract())
        };
        Some(Self { low: at(0.25)?, median: at(0.5)?, high: at(0.75)?, samples: samples.len() })
    }

    pub fn exact(value: f64) -> Self {
        Self { low: value, median: value, high: value, samples: 1 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Target {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    pub fn met(self, value: f64) -> bool {
        match self {
            Self::AtMost(bound) => value <= bound,
            Self::AtLeast(bound) => value >= bound,
        }
    }
}

/// One line of the table: one measure of each contender.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    /// The row it belongs to, as `ROWS=` takes it.
    pub row: String,
    pub work: String,
    /// What the values are: "× raw", "µs", "instructions" and so on.
    pub unit: String,
    pub values: BTreeMap<Contender, Spread>,
    /// What one operation of the raw file took in microseconds, where the values are ratios to it.
    pub raw_microseconds: Option<f64>,
    /// For the library.
    pub target: Option<Target>,
}

impl Line {
    pub fn new(row: &str, work: impl Into<String>, unit: &str) -> Self {
        let (row, work, unit) = (row.to_owned(), work.into(), unit.to_owned());
        Self { row, work, unit, values: BTreeMap::new(), raw_microseconds: None, target: None }
    }

    pub fn value(mut self, contender: Contender, value: Option<Spread>) -> Self {
        if let Some(value) = value {
            self.values.insert(contender, value);
        }
        self
    }

    /// One value of the library.
    pub fn library(self, value: f64) -> Self {
        self.value(Contender::Library, Some(Spread::exact(value)))
    }

    pub fn at_most(mut self, bound: f64) -> Self {
        self.target = Some(Target::AtMost(bound));
        self
    }

    pub fn at_least(mut self, bound: f64) -> Self {
        self.target = Some(Target::AtLeast(bound));
        self
    }

    pub fn met(&self) -> Option<bool> {
        Some(self.target?.met(self.values.get(&Contender::Library)?.median))
    }
}

pub fn nanoseconds_each(done: &Done) -> f64 {
    done.nanoseconds as f64 / done.operations.max(1) as f64
}

/// The rounds in which nobody lost his core, unless there are hardly any.
pub fn undisturbed<T>(rounds: Vec<(bool, T)>) -> impl Iterator<Item = T> {
    let calm = rounds.iter().filter(|(calm, _)| *calm).count();
    let all = calm < 5.min(rounds.len());
    rounds.into_iter().filter(move |(calm, _)| all || *calm).map(|(_, value)| value)
}

/// Time over the raw file's time in the same round.
pub fn ratios(row: &str, work: impl Into<String>, samples: &Samples) -> Line {
    let mut line = Line::new(row, work, "× raw");
    let Some(raw) = samples.get(&Contender::Raw) else { return line };
    for (&contender, rounds) in samples {
        let paired = rounds.iter().zip(raw).filter_map(|(done, raw)| {
            let (done, raw) = (done.as_ref()?, raw.as_ref()?);
            Some((done.preempted + raw.preempted == 0, nanoseconds_each(done) / nanoseconds_each(raw)))
        });
        if contender != Contender::Raw {
            line = line.value(contender, Spread::of(undisturbed(paired.collect()).collect()));
        }
    }
    line.raw_microseconds = microseconds(raw).map(|spread| spread.median);
    line
}

/// Time of one operation.
pub fn microseconds(rounds: &[Option<Done>]) -> Option<Spread> {
    let times = rounds.iter().flatten().map(|done| (done.preempted == 0, nanoseconds_each(done) / 1000.0));
    Spread::of(undisturbed(times.collect()).collect())
}
