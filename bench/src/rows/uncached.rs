//! Requests whose tables are not in memory.

use anyhow::Result;
use bench_work::protocol::{Kind, Work};

use super::Bench;
use crate::contender::{Contender, Field};
use crate::figures::{Line, ratios};
use crate::place::{GIB, Resident, Shape, opening};

/// A disk of 1 TiB needs 128 MiB of L2 tables, more than anybody keeps in memory by default.
pub fn uncached(bench: &mut Bench) -> Result<Vec<Line>> {
    let (scale, place) = (bench.scale, &bench.tmpfs);
    let (rounds, each) = (scale.rounds(), scale.pick(500, 1_000));
    let mut lines = Vec::new();
    for (resident, disk) in
        [(Resident::Sample { rounds, each }, "1 TiB"), (Resident::Nothing, "1 TiB that is one hole")]
    {
        let shape = Shape::mapped(scale.size(1024 * GIB), 64 << 10, resident);
        shape.make(place, "uncached", &Contender::ALL)?;
        let mut field = Field::open(&Contender::ALL, |who| Ok(opening(&place.of(who, "uncached"))))?;
        let samples = field.rounds(rounds, false, |round| Work::new(Kind::Read, 4096, shape.sample(round), each))?;
        field.close()?;
        place.clear()?;
        let work = format!("random 4 KiB read, {disk}, L2 tables not in memory, {}", place.name);
        let line = ratios("uncached", work, &samples);
        // Where there is nothing to read, the raw file has next to nothing to do.
        lines.push(if resident == Resident::Nothing { line } else { line.at_most(2.5) });
    }
    Ok(lines)
}
