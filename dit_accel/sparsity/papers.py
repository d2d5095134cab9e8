"""The papers that the recipe table cites, by the name it calls them."""

from __future__ import annotations

GRAT = "GRAT: Grouping First, Attending Smartly, Ren et al. 2025, arXiv 2505.14687"
DRAFT = "DraftAttention, Shen et al. 2025, arXiv 2505.14708"
GNA = "Generalized Neighborhood Attention, Hassani et al. 2025, arXiv 2504.16922"
CLEAR = "CLEAR, Liu et al. 2024, arXiv 2412.16112"
STA = "Sliding Tile Attention, Zhang et al. 2025, arXiv 2502.04507"
RADIAL = "Radial Attention, Li et al. 2025, arXiv 2506.19852"
SVG = "Sparse VideoGen, Xi et al. 2025, arXiv 2502.01776"
SVG2 = "Sparse VideoGen 2, Yang et al. 2025, arXiv 2505.18875"
EAR = "SVG-EAR, arXiv 2603.08982"
XATTENTION = "XAttention, Xu et al. 2025, arXiv 2503.16428"
SPARGE = "SpargeAttention, Zhang et al. 2025, arXiv 2502.18137"
PBS = "PBS-Attn, Wang et al. 2025, arXiv 2510.21270"
JENGA = "Jenga, Zhang et al. 2025, arXiv 2505.16864"
ADASPA = "AdaSpa, Xia et al. 2025, arXiv 2502.21079"
VMOBA = "VMoBA, Wu et al. 2025, arXiv 2506.23858"
DFS = "DFSAttn, ICML 2026"
VDIT = "Sparse-vDiT, Chen et al. 2025, arXiv 2506.03065"
RECTIFIED = "Rectified SpaAttn, Liu et al. 2025"
DELTA = "Delta Attention, Willette et al. 2025, arXiv 2505.11254"
MINFERENCE = "MInference, Jiang et al. 2024, arXiv 2407.02490"
ZIPVL = "ZipVL, He et al. 2024, arXiv 2410.08584"
CHANNELS = "Double Sparsity, Yang et al. 2024, arXiv 2408.07092"
PARO = "PAROAttention, Zhao et al. 2025, arXiv 2506.16054"
DUO = "DuoAttention, Xiao et al. 2024, arXiv 2410.10819"
MOA = "MoA, Fu et al. 2024, arXiv 2406.14909"
RETTENTION = "Re-ttention, Chen et al. 2025"
TIDAL = "TidalDecode, Yang et al. 2024, arXiv 2410.05076"
SVOO = "SVOO, ICML 2026, arXiv 2603.18636"
FLEXPREFILL = "FlexPrefill, Lai et al. 2025, arXiv 2502.20766"
HIP = "InfiniteHiP, Lee et al. 2025, arXiv 2502.08910"
SALE = "SALE, Ji et al. 2025, arXiv 2505.24179"
AGENT = "Agent Attention, Han et al. 2023, arXiv 2312.08874"

# What these papers settle offline, and what holds here instead without a profile.
WITHOUT_PROFILE = {
    STA: "all heads share one window",
    VDIT: "heads choose among patterns online",
    PARO: "heads choose among orders online",
    DUO: "which heads see everything is measured online",
    MOA: "heads choose among spans online, layer by layer",
    SVOO: "all heads share one floor",
}
