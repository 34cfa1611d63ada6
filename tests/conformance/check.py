"""proto"""
import sys, time, json, traceback, shutil, warnings, os, logging
from pathlib import Path
sys.path.insert(0, "/tmp/fam"); sys.path.insert(0, str(Path(__file__).parent))
import torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
import transformers
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
sys.path.insert(0,str(Path(__file__).parent.parent)); import families; from transformers import CONFIG_MAPPING
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers, decoders
from plain_reader import read_packed
import gemq
from gemq.errors import UserError
from gemq.recipe import Recipe
from gemq.pipeline import quantize

def tokenizer(path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>":0,"<s>":1,"</s>":2, **{c: i+3 for i,c in enumerate(alphabet)}}
    t = Tokenizer(models.BPE(vocab=vocab, merges=[])); t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False); t.decoder=decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(path)

def make(model_type):
    m = families.tiny(model_type)
    return m, (AutoModelForMultimodalLM if type(m.config) in AutoModelForMultimodalLM._model_mapping else AutoModelForCausalLM)

def check(model_type, folder):
    t0=time.time(); times={}
    def lap(n): times[n]=round(time.time()-t0,2)
    shutil.rmtree(folder, ignore_errors=True); folder.mkdir(parents=True)
    model, auto = make(model_type)
    src, out = folder/"src", folder/"out"
    model.save_pretrained(src); tokenizer(src)
    g=torch.Generator().manual_seed(5)
    (folder/"text.txt").write_text("".join(chr(i) for i in torch.randint(33,126,(600,),generator=g).tolist()))
    lap("make")
    recipe = Recipe.from_dict(dict(effort="low", bits=2.0, calib=[str(folder/"text.txt")], windows=6, window=24, batch_tokens=72, guard=False))
    result = quantize(str(src), recipe, out=out, device="cpu")
    lap("quantize")
    ids = torch.randint(3,256,(2,20),generator=g)
    loaded = gemq.load(out, dtype=torch.float32)
    weights, rest, config = read_packed(out)
    lap("load")
    # twin
    reference = auto.from_pretrained(src, dtype=torch.float32)
    for name, w in weights.items():
        p = reference.get_parameter(name)
        if p.shape != w.shape: w = w.transpose(-1,-2)
        elif p.dim()==3 and getattr(reference.get_submodule(name.rpartition(".")[0]),"is_transposed",False): w = w.transpose(-1,-2)
        if p.dim()==3 and len(p)>len(w): w=torch.cat([w,p.data[len(w):]])
        p.data.copy_(w)
    reference.set_experts_implementation("eager") if hasattr(reference,"set_experts_implementation") else None
    experts = {n:p for n,p in model.named_parameters() if p.dim()>=3 and min(p.shape[-2:])>=16}
    share = sum(w.numel() for n,w in weights.items() if n in experts)/max(1,sum(p.numel() for p in experts.values()))
    unq=[n for n in experts if n not in weights]
    with torch.no_grad():
        a=loaded(input_ids=ids,use_cache=False).logits; b=reference(input_ids=ids,use_cache=False).logits
        o=model(input_ids=ids,use_cache=False).logits
    lap("logits")
    d=((a-b).norm()/b.norm()).item(); dq=((o-b).norm()/o.norm()).item()
    gen = loaded.generate(ids[:1], max_new_tokens=4, do_sample=False)
    lap("generate")
    return dict(diff=d, quant=dq, share=share, unq=unq[:3], q=result.quantized_share, fallbacks={k:v for k,v in result.fallbacks.items() if v}, gen=gen.shape[1]-20, times=times)

if __name__=="__main__":
    base=Path(os.environ.get("FOLDER","/tmp/fam/work")+transformers.__version__)
    for n in sys.argv[1:]:
        if n not in CONFIG_MAPPING: continue
        try:
            r=check(n, base/n); print(n,"OK" if r["diff"]<1e-4 else "DIFF", r, flush=True)
        except Exception as e:
            tb=traceback.extract_tb(e.__traceback__)
            mine=[f for f in tb if "gemq" in f.filename or "families" in f.filename]
            print(n,"REFUSED" if isinstance(e,UserError) else "CRASH", type(e).__name__, str(e).strip().replace("\n"," ")[:300], "@", tb[-1].filename.split("/")[-1],tb[-1].lineno, "<-", mine[-1].filename.split("/")[-1], mine[-1].lineno, flush=True)
        shutil.rmtree(base/n, ignore_errors=True)
