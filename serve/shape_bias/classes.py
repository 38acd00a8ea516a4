"""The 16 classes that people were asked for, as sets of ImageNet's 1000."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from serve.errors import ContractError

IMAGENET_CLASSES = 1000
_TABLE = """
airplane 404:n02690373
bear 294:n02132136 295:n02133161 296:n02134084 297:n02134418
bicycle 444:n02835271 671:n03792782
bird 8:n01514859 10:n01530575 11:n01531178 12:n01532829 13:n01534433 14:n01537544 15:n01558993 16:n01560419 18:n01582220
bird 19:n01592084 20:n01601694 22:n01614925 23:n01616318 24:n01622779 80:n01795545 81:n01796340 82:n01797886 83:n01798484
bird 87:n01817953 88:n01818515 89:n01819313 90:n01820546 91:n01824575 92:n01828970 93:n01829413 94:n01833805 95:n01843065
bird 96:n01843383 98:n01855032 99:n01855672 100:n01860187 127:n02002556 128:n02002724 129:n02006656 130:n02007558
bird 131:n02009229 132:n02009912 133:n02011460 135:n02013706 136:n02017213 137:n02018207 138:n02018795 139:n02025239
bird 140:n02027492 141:n02028035 142:n02033041 143:n02037110 144:n02051845 145:n02056570
boat 472:n02951358 554:n03344393 625:n03662601 814:n04273569 914:n04612504
bottle 440:n02823428 720:n03937543 737:n03983396 898:n04557648 899:n04560804 901:n04579145 907:n04591713
car 436:n02814533 511:n03100240 817:n04285008
cat 281:n02123045 282:n02123159 283:n02123394 284:n02123597 285:n02124075 286:n02125311
chair 423:n02791124 559:n03376595 765:n04099969 857:n04429376
clock 409:n02708093 530:n03196217 892:n04548280
dog 152:n02085782 153:n02085936 154:n02086079 155:n02086240 156:n02086646 157:n02086910 158:n02087046 159:n02087394
dog 160:n02088094 161:n02088238 162:n02088364 163:n02088466 164:n02088632 165:n02089078 166:n02089867 167:n02089973
dog 168:n02090379 169:n02090622 170:n02090721 171:n02091032 172:n02091134 173:n02091244 174:n02091467 175:n02091635
dog 176:n02091831 177:n02092002 178:n02092339 179:n02093256 180:n02093428 181:n02093647 182:n02093754 183:n02093859
dog 184:n02093991 185:n02094114 186:n02094258 187:n02094433 188:n02095314 189:n02095570 190:n02095889 191:n02096051
dog 193:n02096294 194:n02096437 195:n02096585 196:n02097047 197:n02097130 198:n02097209 199:n02097298 200:n02097474
dog 201:n02097658 202:n02098105 203:n02098286 205:n02099267 206:n02099429 207:n02099601 208:n02099712 209:n02099849
dog 210:n02100236 211:n02100583 212:n02100735 213:n02100877 214:n02101006 215:n02101388 216:n02101556 217:n02102040
dog 218:n02102177 219:n02102318 220:n02102480 221:n02102973 222:n02104029 223:n02104365 224:n02105056 225:n02105162
dog 226:n02105251 228:n02105505 229:n02105641 230:n02105855 231:n02106030 232:n02106166 233:n02106382 234:n02106550
dog 235:n02106662 236:n02107142 237:n02107312 238:n02107574 239:n02107683 240:n02107908 241:n02108000 243:n02108422
dog 244:n02108551 245:n02108915 246:n02109047 247:n02109525 248:n02109961 249:n02110063 250:n02110185 252:n02110627
dog 253:n02110806 254:n02110958 255:n02111129 256:n02111277 257:n02111500 259:n02112018 261:n02112350 262:n02112706
dog 263:n02113023 265:n02113624 266:n02113712 267:n02113799 268:n02113978
elephant 385:n02504013 386:n02504458
keyboard 508:n03085013 878:n04505470
knife 499:n03041632
oven 766:n04111531
truck 555:n03345487 569:n03417042 656:n03770679 675:n03796401 717:n03930630 734:n03977966 864:n04461696 867:n04467665
"""
"""Class, then index:synset of each of its members in ImageNet (ILSVRC 2012, sorted by synset as torchvision does), 207 in all.
The indices are those of `human_categories.py` in rgeirhos/texture-vs-shape and bethgelab/model-vs-human."""


def _parsed() -> dict[str, dict[int, str]]:
    members: dict[str, dict[int, str]] = {}
    for line in _TABLE.strip().splitlines():
        name, *pairs = line.split()
        members.setdefault(name, {}).update({int(index): synset for index, synset in (pair.split(":") for pair in pairs)})
    return members


MEMBERS = _parsed()
"""Class -> index in ImageNet -> synset; the classes in alphabetical order."""


def columns_of(classes: Sequence[str]) -> dict[str, list[int]]:
    """Class -> its columns in a head over ImageNet's classes, which are named by synset (n02123045) or by index (281).

    Raises: ContractError if these are not ImageNet's classes.
    """
    if len(classes) != IMAGENET_CLASSES:
        raise ContractError(
            f"the head has {len(classes)} classes, such as {classes[0]}, wanted ImageNet's {IMAGENET_CLASSES}: "
            "simclr evaluate --protocol imagenet-linear --images imagenet --save HEAD.npz, or simclr fit-head"
        )
    numbered = all(name.isdecimal() for name in classes)
    place = {str(int(name)) if numbered else name: column for column, name in enumerate(classes)}
    wanted = {
        kind: [str(index) if numbered else synset for index, synset in members.items()] for kind, members in MEMBERS.items()
    }
    required = map(str, range(IMAGENET_CLASSES)) if numbered else (name for names in wanted.values() for name in names)
    lacking = [name for name in required if name not in place]
    if lacking:
        raise ContractError(
            f"the head's classes, such as {classes[0]}, are not ImageNet's: {len(lacking)} are missing, such as {lacking[0]}; "
            "wanted the names of ImageNet's folders (n01440764 ...) or 0 to 999"
        )
    return {kind: [place[name] for name in names] for kind, names in wanted.items()}


def decide(probabilities_NC: NDArray[np.float32], columns: dict[str, list[int]]) -> list[str]:
    """The class with the largest mean probability over its columns, for each row; the first in the alphabet wins ties."""
    means = np.stack([probabilities_NC[:, places].mean(axis=1, dtype=np.float64) for places in columns.values()], axis=1)
    names = list(columns)
    return [names[number] for number in means.argmax(axis=1)]
