"""Methods that nothing serves, by name: baselines, oracles and ablations of our ranking."""

from ..quality.ranking import Method
from .baselines.blocks import BlockMean, FlashPrefill, FlexPrefill
from .baselines.oracles import BlockOracle, TokenOracle
from .baselines.pbs import PBS
from .baselines.token import S2OPaper, VecAttention
from .baselines.xattention import XAttention
from .low_rank import S2O, LowRank

COMPARED: tuple[type[Method], ...] = (
    S2O,
    S2OPaper,
    PBS,
    BlockMean,
    FlexPrefill,
    XAttention,
    VecAttention,
    FlashPrefill,
    BlockOracle,
    TokenOracle,
)
METHODS: tuple[type[Method], ...] = (*COMPARED, LowRank)
